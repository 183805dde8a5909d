"""App of the benchmarks: all tasks and workflows, and a report of each worker."""

from __future__ import annotations

from bench.workloads.steps import TASKS
from bench.workloads.worker_report import report_worker
from bench.workloads.workflows import five_steps, many_steps, one_step, sleeper
from pgtask import App

__all__ = ["app"]

app = App(*TASKS, one_step, five_steps, many_steps, sleeper, lifespan=report_worker)
