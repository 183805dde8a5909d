"""Cost of a crash for the tasks beside it: they run again in halves, until the task that kills its process is alone.

Invariants: each case is one burst of two processes; times are from the start of the supervisor to the last finished
task; a poison is a segmentation fault. A task that is lost, done twice, parked wrongly, or has lost a try fails the
run.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import msgspec

from bench.harness.burst import BurstResult, run_burst
from bench.harness.contender import RunFailed
from bench.harness.observers import Observer, SingleKill
from bench.harness.progress import Progress
from bench.harness.server import Server
from bench.workloads.bursts import Segfault, Sleep
from pgtask import Task

__all__ = ["HALVES", "HalvesResult", "HalvesTerms", "halves_lines", "measure_halves"]

HALVES = {
    "kill": "one kill -9 in the middle of steps that last",
    "segfault": "one poison among steps that last, all under way in one process",
    "poisons": "some poisons among many short tasks",
}
_PROCS = 2
_SHORT_STEP = 0.005  # seconds


class HalvesTerms(msgspec.Struct, frozen=True):
    """Values of the flags. `scenarios`: the names of the cases. `seconds`: of a step. `among`: tasks of `poisons`."""

    scenarios: Sequence[str]
    steps: int
    seconds: float
    among: int
    poisons: int


class HalvesResult(msgspec.Struct, frozen=True):
    """Burst of one case. `ratio`: its seconds over those of the same burst undisturbed. More than `max_deaths` are a
    failure."""

    scenario: str
    tasks: int
    poisons: int
    deaths: int
    max_deaths: int
    seconds: float
    ratio: float | None
    parked: int
    lost: int
    doubled: int

    @property
    def failures(self) -> list[str]:
        found = [f"{count} {what}" for what, count in (("lost", self.lost), ("doubled", self.doubled)) if count]
        if self.parked != self.poisons:
            found.append(f"{self.parked} parked, of {self.poisons} poisons")
        if self.deaths > self.max_deaths:
            found.append(f"{self.deaths} deaths, more than {self.max_deaths}")
        return [f"{self.scenario}: {failure}" for failure in found]


def measure_halves(server: Server, terms: HalvesTerms, progress: Progress) -> list[HalvesResult]:
    """Run each case once. Raises `RunFailed`."""
    found = []
    for name in terms.scenarios:
        found.append(_CASES[name](server, terms))
        progress(f"{name:<20} {found[-1].deaths} deaths, {found[-1].seconds:.1f} s")
    return found


def _run_kill(server: Server, terms: HalvesTerms) -> HalvesResult:
    steps: list[Task] = [Sleep(terms.seconds)] * terms.steps
    each = -(-terms.steps // _PROCS)
    undisturbed = Observer()
    base = _burst_seconds(run_burst(server, steps, _PROCS, undisturbed, concurrency=each), undisturbed)
    kill = SingleKill(_PROCS, terms.seconds / 2)
    result = run_burst(server, steps, _PROCS, kill, concurrency=each)
    if kill.count_events("worker.died") == 0:
        raise RunFailed("kill: the burst was over before the kill; give it longer --step-seconds")
    seconds = _burst_seconds(result, kill)
    return _case_result("kill", result, kill, tasks=len(steps), poisons=0, max_deaths=1, ratio=seconds / base)


def _run_segfault(server: Server, terms: HalvesTerms) -> HalvesResult:
    """Start the poison last, so that all other steps are under way beside it."""
    steps: list[Task] = [*[Sleep(terms.seconds)] * (terms.steps - 1), Segfault()]
    result = run_burst(server, steps, _PROCS, observer := Observer(), concurrency=terms.steps, code=1)
    max_deaths = (terms.steps - 1).bit_length() + 3
    return _case_result("segfault", result, observer, tasks=len(steps), poisons=1, max_deaths=max_deaths)


def _run_poisons(server: Server, terms: HalvesTerms) -> HalvesResult:
    steps: list[Task] = [Sleep(_SHORT_STEP)] * terms.among
    for number in range(terms.poisons):
        steps[(2 * number + 1) * terms.among // (2 * terms.poisons)] = Segfault()
    result = run_burst(server, steps, _PROCS, observer := Observer(), code=1 if terms.poisons else 0)
    max_deaths = terms.poisons * (7 + 3)  # halving a hundred tasks takes seven deaths
    return _case_result("poisons", result, observer, tasks=len(steps), poisons=terms.poisons, max_deaths=max_deaths)


_CASES: dict[str, Callable[[Server, HalvesTerms], HalvesResult]] = {
    "kill": _run_kill,
    "segfault": _run_segfault,
    "poisons": _run_poisons,
}


def _case_result(
    scenario: str,
    result: BurstResult,
    observer: Observer,
    *,
    tasks: int,
    poisons: int,
    max_deaths: int,
    ratio: float | None = None,
) -> HalvesResult:
    return HalvesResult(
        scenario=scenario,
        tasks=tasks,
        poisons=poisons,
        deaths=observer.count_events("worker.died"),
        max_deaths=max_deaths,
        seconds=_burst_seconds(result, observer),
        ratio=ratio,
        parked=len(result.errors),
        lost=result.lost,
        doubled=result.doubled,
    )


def _burst_seconds(result: BurstResult, observer: Observer) -> float:
    """Return the seconds from the start of the supervisor to the last task that is finished or parked."""
    ends = [result.commits[-1][0], *observer.event_times("task.parked")]
    return max(ends) - observer.event_times("supervisor.started")[0]


def halves_lines(results: Sequence[HalvesResult]) -> list[str]:
    return [
        f"{one.scenario:<27} {one.tasks:,} tasks, {HALVES[one.scenario]}: {one.deaths} deaths, "
        f"{one.parked} parked, {one.seconds:.1f} s"
        + (f", {one.ratio:.2f} times the undisturbed time" if one.ratio is not None else "")
        for one in results
    ]
