"""The schedules of an app: what starts when, again and again.

Invariant: a schedule is checked when it is made, so that the engine can trust it. Nothing here does I/O.
"""

from __future__ import annotations

from typing import Any, Literal, TypeAlias, get_args

import msgspec

from pgtask._cron import CronError, check_cron, check_zone
from pgtask._dsn import quoted
from pgtask._placement import choose_lane
from pgtask._validate import encode_input, encode_step, envelope_of
from pgtask.config import DEFAULT_MAX_STEP_BYTES
from pgtask.errors import DefinitionError, EnqueueError
from pgtask.task import Task
from pgtask.workflow import Workflow, check_name

__all__ = ["DeclaredSchedule", "Missed", "Overlap", "Schedule"]

Missed: TypeAlias = Literal["skip", "latest", "all"]
Overlap: TypeAlias = Literal["skip", "allow"]

MAX_MISSED = 10_000


class DeclaredSchedule(msgspec.Struct, frozen=True):
    """A schedule as its row has it: see the comments on the columns of `pg_task_schedules`."""

    name: str
    cron: str
    zone: str
    step: str
    workflow: str | None
    queue: str
    priority: int
    missed: Missed
    max_missed: int
    overlap: Overlap


class Schedule(msgspec.Struct, frozen=True):
    """A schedule of an app: `App(..., schedules=[Schedule("nightly", "0 3 * * *", Plan(), zone="Europe/Berlin")])`.

    Each time of it is an occurrence, which starts a task once, whatever fails. `ctx.scheduled_for` is its time.

    - `name`: a name that is unique in the database. The same name keeps its place when the rest changes.
    - `cron`: minute, hour, day of the month, month, day of the week, as `"*/15 8-18 * * MON-FRI"`; or six fields, of
      which the first is the second; or `@hourly`, `@daily`, `@weekly`, `@monthly`, `@yearly`.
    - `step`: the first step of the task, or a workflow, which starts a run with `input`.
    - `zone`: the time zone of the expression. Fixed times happen once a day also when the clock changes.
    - `missed`: what to do with times that have passed while no worker looked. `"skip"` drops what is more than a
      minute late, `"latest"` runs one task for the last of them, `"all"` one for each of the last `max_missed`.
    - `overlap`: `"skip"` leaves an occurrence out while the task of the one before waits or runs; with `missed="all"`
      it waits instead, until that task has ended. `"allow"` starts it anyway. A parked task holds up nothing.
    - `queue`, `priority`: by default those of the policy of the step.

    Raises `DefinitionError` naming the schedule, the argument and the remedy. Needs the extra `schedules`.
    """

    name: str
    cron: str
    step: Task | Workflow[Any, Any]
    input: Any = None
    zone: str = "UTC"
    missed: Missed = "latest"
    overlap: Overlap = "skip"
    max_missed: int = 1000
    queue: str | None = None
    priority: int | None = None

    def __post_init__(self) -> None:
        check_name("schedule", self.name, DefinitionError)
        for argument, value, check in (("cron", self.cron, check_cron), ("zone", self.zone, check_zone)):
            if not isinstance(value, str):
                raise DefinitionError(f"schedule {self.name}: {argument}={quoted(value)} must be a string")
            try:
                check(value)
            except CronError as error:
                raise DefinitionError(f"schedule {self.name}: {argument}={quoted(value)}: {error}") from None
        for argument, value, choices in (("missed", self.missed, Missed), ("overlap", self.overlap, Overlap)):
            if value not in get_args(choices):
                listed = " or ".join(f'"{choice}"' for choice in get_args(choices))
                raise DefinitionError(f"schedule {self.name}: {argument}={quoted(value)} must be {listed}")
        limit = self.max_missed
        if isinstance(limit, bool) or not isinstance(limit, int) or not 1 <= limit <= MAX_MISSED:
            raise DefinitionError(
                f"schedule {self.name}: max_missed={limit!r} must be a whole number from 1 to {MAX_MISSED:,}"
            )
        self._declared()

    def _declared(self) -> DeclaredSchedule:
        """Return its row. Raises `DefinitionError` for a step that cannot be enqueued."""
        try:
            text, workflow, lane = self._encode_step()
        except EnqueueError as error:
            raise DefinitionError(f"schedule {self.name}: {error}") from None
        return DeclaredSchedule(
            *(self.name, self.cron, self.zone, text, workflow, *lane, self.missed, self.max_missed, self.overlap)
        )

    def _encode_step(self) -> tuple[str, str | None, tuple[str, int]]:
        """Return the text of the step, the name of its workflow if it is one, its queue and priority."""
        step = self.step
        if isinstance(step, Workflow):
            text = encode_input(step, self.input, DEFAULT_MAX_STEP_BYTES)
            return text, step.name, choose_lane(step.policy, self.queue, self.priority)
        if self.input is not None:
            raise EnqueueError("input= is for a workflow; a step has its own fields")
        codec, payload, lane = encode_step(self.queue, self.priority, DEFAULT_MAX_STEP_BYTES, step)
        return envelope_of(codec, payload), None, lane
