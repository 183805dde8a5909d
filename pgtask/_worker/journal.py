"""journal: what the runs of this worker record, in commits that they share.

Invariants: a waiter is released after the commit of its entry; an entry is written under the lease of its run or not at
all, and then its waiter gets `RunStopped`; a task that somebody else has locked holds up its own run only.

Entries gather while a commit is under way; then a statement for each kind takes all of them. So a batch grows with the
load by itself, and a lone entry waits for nobody.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import defaultdict
from collections.abc import Callable, Collection, Sequence
from datetime import UTC, datetime
from typing import Any
from uuid import UUID

from pgtask._events import log_event
from pgtask._fastpath import Lease
from pgtask._postgres.store import Link
from pgtask._worker.entries import Checkpoint, ChildRow, Ended, Entry, History, Pause, Taken
from pgtask.errors import DataRefused, RunStopped

__all__ = ["Journal"]

log = logging.getLogger("pgtask.journal")

BUSY, LONGEST_BUSY = 0.002, 0.25  # seconds until an entry is tried again whose task somebody else had locked
MOST_ENTRIES = 1000  # in one statement
MOST_CHILDREN = 2000


class Journal:
    """The journal of one worker, over `link`, which nobody else uses. `due_in` is told in how many seconds a run that
    was let go falls due."""

    def __init__(self, link: Link, *, due_in: Callable[[float], None]) -> None:
        self._link = link
        self._due_in = due_in
        self._loop = asyncio.get_running_loop()
        self._work = asyncio.Event()
        self._offset = 0.0  # from the monotonic clock to that of the database, see `_set_clock`
        self._loads: list[tuple[UUID, asyncio.Future[History]]] = []
        self._collects: list[tuple[list[UUID], asyncio.Future[dict[UUID, Ended]]]] = []
        self._entries: dict[str, list[Entry]] = defaultdict(list)
        self._finished = self._parked = self._lost = 0

    def totals(self) -> tuple[int, int, int]:
        """Runs that have ended well, and as ERROR, in the database; entries dropped because the lease was lost."""
        return self._finished, self._parked, self._lost

    # --- what runs ask for: see `Journalled`

    def now(self) -> datetime:
        return datetime.fromtimestamp(time.monotonic() + self._offset, UTC)

    def _set_clock(self, now: datetime, sent: float, received: float) -> None:
        """The database said `now` at some time between these two. The clock is moved only as far as that proves it
        wrong: a statement that was kept waiting, by a lock or an outage, proves little. Where nothing is known it is
        late rather than early, but by then not behind `now`: what was due for the database is due here."""
        self._offset = min(max(self._offset, now.timestamp() - received), now.timestamp() - sent)

    def load(self, run: UUID) -> asyncio.Future[History]:
        loaded: asyncio.Future[History] = self._loop.create_future()
        self._loads.append((run, loaded))
        self._work.set()
        return loaded

    def collect(self, runs: list[UUID]) -> asyncio.Future[dict[UUID, Ended]]:
        collected: asyncio.Future[dict[UUID, Ended]] = self._loop.create_future()
        self._collects.append((runs, collected))
        self._work.set()
        return collected

    def adopt(self, lease: Lease, name: str) -> asyncio.Future[None]:
        return self._enter("adopt", lease, (name,))

    def record(self, lease: Lease, checkpoint: Checkpoint, version: int | None) -> asyncio.Future[None]:
        return self._enter("record", lease, (*checkpoint, version))

    def spawn(
        self, lease: Lease, checkpoint: Checkpoint, version: int | None, children: list[ChildRow]
    ) -> asyncio.Future[None]:
        return self._enter("spawn", lease, (*checkpoint, version), children)

    def take(self, lease: Lease, checkpoint: Checkpoint, version: int | None) -> asyncio.Future[Taken]:
        return self._enter("take", lease, (*checkpoint, version))

    def pause(self, lease: Lease, pause: Pause) -> asyncio.Future[datetime | None]:
        return self._enter("pause", lease, pause, pause.children)

    def end(
        self, lease: Lease, *, output: str | None, error: str | None, tried: int, forgotten: Sequence[int], version: int
    ) -> asyncio.Future[None]:
        return self._enter("end", lease, (error, output, tried, forgotten, version))

    def _enter(
        self, kind: str, lease: Lease, columns: tuple[Any, ...], children: list[Any] | None = None
    ) -> asyncio.Future[Any]:
        written: asyncio.Future[Any] = self._loop.create_future()
        self._entries[kind].append(Entry(lease, columns, children or [], written))
        self._work.set()
        return written

    # --- the writer

    async def run(self) -> None:
        """Write what gathers, until cancelled. Raises `DatabaseRefused`."""
        try:
            while True:
                await self._work.wait()
                self._work.clear()
                await asyncio.sleep(0)  # who is released in this turn of the loop may have another entry
                await self._answer()
                for kind in list(self._entries):
                    while entries := self._take_batch(kind):
                        await self._write(kind, entries)
        finally:
            await self._link.close()

    def _take_batch(self, kind: str) -> list[Entry]:
        """Entries for one statement: each run once where that matters, and not too many children."""
        waiting = self._entries[kind]
        if not waiting:
            return []
        if kind == "record":
            batch, self._entries[kind] = waiting[:MOST_ENTRIES], waiting[MOST_ENTRIES:]
            return batch
        batch, rest, runs, children = [], [], set(), 0
        for entry in waiting:
            children += len(entry.children)
            if entry.lease.id in runs or len(batch) >= MOST_ENTRIES or (batch and children > MOST_CHILDREN):
                rest.append(entry)
            else:
                batch.append(entry)
                runs.add(entry.lease.id)
        self._entries[kind] = rest
        if kind == "end":
            batch.sort(key=lambda entry: entry.lease.id)  # pauses lock the records of children in the same order
        return batch

    async def _answer(self) -> None:
        """What is only read."""
        if self._loads:
            loads, self._loads = self._loads, []
            await self._load(loads)
        while self._collects:
            runs, collected = self._collects.pop(0)
            rows = await self._link.run("journal/collect", runs)
            if not collected.done():
                collected.set_result({UUID(int=row[0].int): Ended(*row[1:]) for row in rows if row[1] is not None})

    async def _load(self, loads: list[tuple[UUID, asyncio.Future[History]]]) -> None:
        sent = time.monotonic()
        rows = await self._link.run("journal/load", [run for run, _ in loads])
        received = time.monotonic()
        histories: dict[UUID, History] = {}
        for run, wakeup_at, now, is_known, version, state, number, *rest in rows:
            history = histories.get(run)
            if history is None:
                history = histories[run] = History(wakeup_at, is_known, version, state, [])
                self._set_clock(now, sent, received)
            if number is not None:
                history.checkpoints.append(Checkpoint(number, *rest))
        for run, loaded in loads:
            if not loaded.done():
                loaded.set_result(histories[run])

    async def _write(self, kind: str, entries: list[Entry]) -> None:
        """Write entries of one kind and release who waits for them. What is refused for its data is found by halves."""
        is_certain = True

        def unsure() -> None:
            nonlocal is_certain
            is_certain = False

        try:
            rows = await self._link.run(f"journal/{kind}", *_parameters(kind, entries), on_loss=unsure)
        except DataRefused as error:
            if len(entries) > 1:
                await self._write(kind, entries[::2])
                await self._write(kind, entries[1::2])
            elif not entries[0].written.done():
                entries[0].written.set_exception(error)
            return
        held = self._answers(kind, entries, rows)
        if kind == "end":
            self._count(entries if held is None else [entry for entry in entries if entry.lease.id in held])
        missing = []
        for entry in entries:
            if held is not None and entry.lease.id not in held:
                missing.append(entry)
            else:
                answer: Any = None if held is None else held[entry.lease.id]
                if kind in ("record", "spawn") or (kind == "take" and answer.is_over):
                    entry.lease.clear()
                if not entry.written.done():
                    entry.written.set_result(answer)
        if missing:
            # Sent twice, a run that is no longer ours was probably let go by the first attempt.
            await self._settle(kind, missing, is_lost=is_certain or kind not in ("pause", "end"))

    def _answers(self, kind: str, entries: list[Entry], rows: list[Any]) -> dict[UUID, Any] | None:
        """What to tell the waiter of each run that was held; None: nothing, and all were."""
        if kind == "take":
            return {row[0]: Taken(*row[1:]) for row in rows}
        if kind == "pause":
            due = {entry.lease.id: entry.columns[1] for entry in entries}
            for run, lets_go, _ in rows:
                if lets_go and due[run] is not None:
                    self._due_in(max(0.0, (due[run] - self.now()).total_seconds()))
            return {run: None if lets_go else wakeup_at for run, lets_go, wakeup_at in rows}
        held = rows[0][0]
        return None if held is None else dict.fromkeys(held)

    def _count(self, entries: Collection[Entry]) -> None:
        for entry in entries:
            if entry.columns[0] is None:
                self._finished += 1
            else:
                self._parked += 1

    async def _settle(self, kind: str, entries: list[Entry], *, is_lost: bool) -> None:
        """Of entries that were not written: those whose task is only locked are tried again, the others are lost."""
        rows = await self._link.run(
            "journal/ours", [entry.lease.id for entry in entries], [entry.lease.token for entry in entries]
        )
        ours = {row[0] for row in rows}
        for entry in entries:
            if entry.lease.id in ours:
                entry.busy = min(max(BUSY, 2 * entry.busy), LONGEST_BUSY)
                self._loop.call_later(entry.busy, self._again, kind, entry)
            elif not entry.written.done():
                if is_lost:
                    self._lost += 1
                    log_event(
                        log, logging.WARNING, "run.lost", run=entry.lease.id, step=entry.lease.label, dropped=kind
                    )
                    entry.written.set_exception(RunStopped("the lease of the run was lost"))
                else:
                    entry.written.set_result(None)

    def _again(self, kind: str, entry: Entry) -> None:
        self._entries[kind].append(entry)
        self._work.set()


def _parameters(kind: str, entries: list[Entry]) -> list[list[Any]]:
    """The parameters of a statement: columns of runs and tokens, then those of the entries."""
    runs = [entry.lease.id for entry in entries]
    # An array of nulls is as good as an empty one, which costs nothing to send.
    columns = [
        list(column) if column.count(None) < len(entries) else []
        for column in zip(*(entry.columns for entry in entries), strict=True)
    ]
    leases = [runs, [entry.lease.token for entry in entries]]
    if kind == "spawn":
        number, place, _, name, result, _, _, _, _, version = columns
        children = [(run, *child) for run, entry in zip(runs, entries, strict=True) for child in entry.children]
        return [*leases, version, *map(list, zip(*children, strict=True)), number, place, name, result]
    if kind == "take":
        number, place, _, name, _, _, due_at, _, _, version = columns
        return [*leases, name, number, place, due_at, version]
    if kind == "pause":
        pairs = [(run, child) for run, entry in zip(runs, entries, strict=True) for child in sorted(entry.children)]
        seen_at, due_at, tried, waits_on, any_child, children = columns
        counts = [len(ids) for ids in children]
        return [
            *(*leases, seen_at, due_at, tried, waits_on),
            *([run for run, _ in pairs], [child for _, child in pairs], counts, any_child),
        ]
    if kind == "end":
        error, output, tried, _, version = columns
        failures = [(entry.lease.id, number) for entry in entries for number in entry.columns[3]]
        return [*leases, error, output, tried, version, [run for run, _ in failures], [one for _, one in failures]]
    return [*leases, *columns]
