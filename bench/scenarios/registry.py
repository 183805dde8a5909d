"""All scenarios, in the order of `python -m bench --help`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from bench.scenario import Scenario
from bench.scenarios.crashes import CrashesScenario
from bench.scenarios.dead import DeadScenario
from bench.scenarios.depth import DepthScenario
from bench.scenarios.doors import DoorsScenario
from bench.scenarios.drain import DrainScenario
from bench.scenarios.enqueue import EnqueueScenario
from bench.scenarios.idle import IdleScenario
from bench.scenarios.latency import LatencyScenario
from bench.scenarios.procs import ProcsScenario
from bench.scenarios.producers import ProducersScenario
from bench.scenarios.recover import RecoverScenario
from bench.scenarios.schedules import SchedulesScenario
from bench.scenarios.share import ShareScenario
from bench.scenarios.stages import StagesScenario
from bench.scenarios.workflows import WorkflowsScenario

__all__ = ["SCENARIOS"]

SCENARIOS: Sequence[Scenario[Any]] = (
    *(DrainScenario(), LatencyScenario(), EnqueueScenario(), ProducersScenario(), IdleScenario(), DepthScenario()),
    *(DoorsScenario(), DeadScenario(), SchedulesScenario()),
    *(ProcsScenario(), ShareScenario(), WorkflowsScenario(), RecoverScenario(), CrashesScenario(), StagesScenario()),
)
