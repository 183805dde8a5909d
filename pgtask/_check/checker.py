"""The check of a table: each row decoded, each open run replayed.

Invariant: the memory is bounded: rows come in portions, the ids of runs wait in a file, and one portion of histories is
here at a time.
"""

from __future__ import annotations

import tempfile
from collections import deque
from collections.abc import AsyncIterator, Sequence
from functools import partial
from pathlib import Path
from typing import IO, Any, cast
from uuid import UUID

import msgspec

from pgtask._check.causes import Break, Cause, Causes
from pgtask._check.dump import Header, read_dump, write_dump
from pgtask._check.remedies import BAD_ENVELOPE, TOO_LARGE, for_payload, for_unknown_step, for_unknown_task
from pgtask._check.replay import replay
from pgtask._fastpath import RowReader, Table, scan_envelope
from pgtask._postgres.waiting import WaitingRun, copy_rows, read_once, read_tasks
from pgtask._workflow.entry import PartialAnswer
from pgtask._workflow.reads import LoadHistory
from pgtask._workflow.values import History
from pgtask.app import App
from pgtask.errors import DecodeError, UnknownStepError

__all__ = ["CheckResult", "check_dump", "check_table", "dump_table"]

ID_BYTES = 16
RUNS_IN_PORTION = 100
IDS_IN_MEMORY = 16 << 20  # bytes


class CheckResult(msgspec.Struct):
    """The numbers of tasks and runs that were checked, and the causes for which some of them break."""

    tasks: int
    runs: int
    causes: list[Cause]

    @property
    def is_broken(self) -> bool:
        """Return whether the new code breaks something that is not broken already."""
        return any(cause.is_new for cause in self.causes)


async def check_table(
    connection: Any,
    apps: Sequence[App],
    *,
    max_bytes: int,
    seconds: float,
    queues: Sequence[str] | None = None,
    sample: int | None = None,
) -> CheckResult:
    """Check all that waits in the table, or in some queues, against the code of the apps that share it; or a
    sample of so many tasks, chosen at random.

    `max_bytes` bounds a step, as for a worker; a replay may take so many `seconds`."""
    with tempfile.SpooledTemporaryFile(max_size=IDS_IN_MEMORY) as runs:
        checker = _Checker(apps, runs, max_bytes, seconds)
        await copy_rows(connection, checker.take_rows, max_bytes=max_bytes, queues=queues, sample=sample)
        await checker.replay_runs(connection)
        return CheckResult(checker.reader.rows, checker.runs, checker.causes.found())


async def check_dump(path: Path, apps: Sequence[App], *, seconds: float) -> tuple[Header, CheckResult]:
    """Check what a file of `dump_table` has. Return what it was asked for, and the result. Raises `ConfigError`."""
    header, parts = read_dump(path)
    with tempfile.SpooledTemporaryFile(max_size=IDS_IN_MEMORY) as runs:
        checker = _Checker(apps, runs, header.max_bytes, seconds)
        for part in parts:
            if isinstance(part, bytes):
                checker.take_rows(part)
            elif checker.can_decode(part.task.step):
                await checker.replay_run(part.task, part.history)
        return header, CheckResult(checker.reader.rows, checker.runs, checker.causes.found())


async def dump_table(connection: Any, path: Path, header: Header) -> int:
    """Write all that waits to a file, for `check_dump`; return the number of tasks. Raises `OSError`."""
    return await write_dump(connection, path, header, _read_runs)


class _Checker:
    """The state of one check. `runs` takes the ids of the tasks that are runs."""

    def __init__(self, apps: Sequence[App], runs: IO[bytes], max_bytes: int, seconds: float) -> None:
        self._apps = apps
        self._tables = [Table(app) for app in apps]
        self._table_of = {family: table for table in reversed(self._tables) for family in table.families}
        self._steps = {(one.task, one.name): one.cls for app in apps for one in app}
        self._workflows = {name: flows for app in reversed(apps) for name, flows in app.workflows.items()}
        self._spool = runs
        self._max_bytes = max_bytes
        self._seconds = seconds
        self.reader = RowReader(self._tables)
        self.causes = Causes()
        self.runs = 0

    # --- rows

    def take_rows(self, chunk: bytes) -> None:
        """Check some of the rows, in the format of COPY."""
        for raw, text, parked_for in self.reader.feed(chunk):
            broken = self._check_row(text)
            if broken is None:
                self._spool.write(raw)
            else:
                self.causes.add(broken, UUID(bytes=raw), parked_for)

    def _check_row(self, text: str | None) -> Break | None:
        """Return why a row breaks; None for a run, whose history is still to be read."""
        if text is None:
            return Break("size", "", f"the step is larger than {self._max_bytes} bytes", lambda: TOO_LARGE)
        try:
            family, step, payload = scan_envelope(text)
        except DecodeError as error:
            return Break("envelope", "", str(error), lambda: BAD_ENVELOPE)
        try:
            self._table_of.get(family, self._tables[0]).decode(text)
        except UnknownStepError as error:
            return Break("unknown", f"{family}.{step}", str(error), partial(self._remedy_for_unknown, family, step))
        except DecodeError as error:
            cls = self._steps.get((family, step))
            remedy = partial(for_payload, cls, payload, str(error))
            return Break("payload", f"{family}.{step}", str(error), remedy)
        return None

    def _remedy_for_unknown(self, family: str, step: str) -> str:
        if family not in self._table_of:
            return for_unknown_task(family, self._table_of)
        return for_unknown_step(step, [name for task, name in self._steps if task == family])

    # --- runs

    async def replay_runs(self, connection: Any) -> None:
        """Replay the runs whose ids were spooled."""
        async for task, history in _read_runs(connection, self._spool):
            await self.replay_run(task, history)

    def can_decode(self, text: str) -> bool:
        """Return whether a worker can decode the step of a run."""
        return self._check_row(text) is None

    async def replay_run(self, task: WaitingRun, history: History) -> None:
        family, _, payload = scan_envelope(task.step)
        if history.wakeup_at is None or (flows := self._workflows.get(family)) is None:
            return  # its task is gone
        self.runs += 1
        broken = await replay(
            flows, task, msgspec.Raw(payload), history, max_bytes=self._max_bytes, seconds=self._seconds
        )
        if broken is not None:
            self.causes.add(broken, task.id, task.error)


async def _read_runs(connection: Any, spool: IO[bytes]) -> AsyncIterator[tuple[WaitingRun, History]]:
    """Yield the runs whose ids were spooled, those that still wait, with their histories."""
    spool.seek(0)
    while portion := spool.read(ID_BYTES * RUNS_IN_PORTION):
        ids = [UUID(bytes=portion[at : at + ID_BYTES]) for at in range(0, len(portion), ID_BYTES)]
        tasks = {task.id: task for task in await read_tasks(connection, ids)}
        async for id, history in read_histories(connection, list(tasks)):
            yield tasks[id], history


async def read_histories(connection: Any, ids: Sequence[UUID]) -> AsyncIterator[tuple[UUID, History]]:
    """Yield the histories of runs, in their order: as much at a time as one statement sends."""
    parts: dict[UUID, list[History]] = {id: [] for id in ids}
    waiting = deque(LoadHistory(id) for id in ids)
    while waiting:
        rows = await read_once(connection, LoadHistory.statement, *LoadHistory.parameters(list(waiting)))
        answers = LoadHistory.answers(list(waiting), rows)
        del rows
        left: deque[LoadHistory] = deque()
        for answer in answers:
            entry = waiting.popleft()
            if isinstance(answer, PartialAnswer):
                parts[entry.run].append(answer.found)
                left.append(cast(LoadHistory, answer.rest))
                continue
            yield entry.run, LoadHistory.join([*parts.pop(entry.run), answer])
        waiting = left
