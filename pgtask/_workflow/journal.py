"""journal: writes the entries of all runs of this worker, in commits that they share.

Invariants: the future of an entry is done after the commit of the entry; an entry is written under the lease of its run
or not at all, and then its future gets `RunStopped`; a task that another session has locked holds up its own run only.
An entry waits for the turn under way and for its place in the next one, however many entries of other classes come.

Entries gather while a commit is under way; then the classes of entries take turns. A turn is one statement for each
class that has entries, which takes all that fit. So where all eight classes stream, an entry waits behind fourteen
statements at most. A batch grows with the load by itself, and a lone entry waits for no other.
"""

from __future__ import annotations

import asyncio
import time
from collections import defaultdict
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any, Protocol, TypeVar
from uuid import UUID

from pgtask._backoff import exponential_delay
from pgtask._fastpath import CounterPage, TaskLease
from pgtask._invariants import CHECKS_INVARIANTS
from pgtask._log import EventLog
from pgtask._postgres.store import Link
from pgtask._postgres.writer import MAX_SIZE, Aside, WriteBatch, Writer
from pgtask._workflow.entries import STATEMENTS
from pgtask._workflow.entry import LOST, JournalEntry, PartialAnswer
from pgtask.errors import DataRefused, RunStopped

__all__ = ["Journal", "PostgresJournal"]

log = EventLog("pgtask.journal")

AnswerT = TypeVar("AnswerT")
EntryClass = type[JournalEntry[Any]]

# Seconds until an entry is tried again whose task another session had locked.
INITIAL_BACKOFF, MAX_BACKOFF = 0.002, 0.25
LOGGED_TRY = 10  # of an entry, about a second after the first
MAX_ENTRIES = 1000  # in one statement


class Journal(Protocol):
    """The journal as a run sees it."""

    def now(self) -> datetime:
        """Return the time by the clock of the database."""

    def submit(self, entry: JournalEntry[AnswerT]) -> asyncio.Future[AnswerT]:
        """Hand in an entry. The future has the answer when the entry is durable; it gets `RunStopped` when the lease is
        no longer held, and then nothing was written."""


class _PendingEntry:
    """An entry that waits to be written, and the future of its answer."""

    __slots__ = ("answered", "entry", "is_certain", "parts", "tries", "turn")

    def __init__(self, entry: JournalEntry[Any], answered: asyncio.Future[Any], turn: int) -> None:
        self.entry = entry
        self.answered = answered
        self.turn = turn  # of the writer when it was handed in
        self.is_certain = True  # False once an attempt may have written it without our knowing
        self.tries = 0  # how often another session had locked its task
        self.parts: list[Any] = []  # of its answer, before the last one


class _EntryBatch(WriteBatch):
    """Entries of one class, for one statement, or a part of them."""

    def __init__(self, journal: PostgresJournal, kind: EntryClass, pending: list[_PendingEntry]) -> None:
        self._journal = journal
        self._kind = kind
        self._pending = pending
        self._entries = [one.entry for one in pending]

    def _of(self, pending: list[_PendingEntry]) -> _EntryBatch:
        part = _EntryBatch(self._journal, self._kind, pending)
        part.inherit(self)
        return part

    @property
    def statement(self) -> str:
        return self._kind.statement

    def __len__(self) -> int:
        return len(self._pending)

    @property
    def size(self) -> int:
        return self._kind.total_size(self._entries)

    def parameters(self) -> list[Any]:
        self._sent = time.monotonic()
        return self._kind.parameters(self._entries)

    def task_ids(self) -> list[UUID]:
        return [entry.task_id for entry in self._entries if entry.task_id is not None]

    def halves(self) -> tuple[_EntryBatch, _EntryBatch]:
        return self._of(self._pending[::2]), self._of(self._pending[1::2])

    def divide(self, ids: set[UUID]) -> tuple[_EntryBatch, _EntryBatch]:
        among = [one for one in self._pending if one.entry.task_id in ids]
        others = [one for one in self._pending if one.entry.task_id not in ids]
        return self._of(among), self._of(others)

    async def answer(self, rows: list[Any], link: Link) -> None:
        answers = self._kind.answers(self._entries, rows)
        self._journal.note_times(self._sent, time.monotonic())
        missing = []
        for pending, answer in zip(self._pending, answers, strict=True):
            if answer is LOST:
                missing.append(pending)
                continue
            if type(answer) is PartialAnswer:
                self._journal.ask_for_rest(self._kind, pending, answer)
                continue
            if pending.parts:
                answer = self._kind.join([*pending.parts, answer])
            pending.entry.complete(answer, self._journal)
            if not pending.answered.done():
                pending.answered.set_result(answer)
        for pending in missing:
            pending.is_certain = pending.is_certain and self.is_certain
        if missing:
            await self._journal.settle_missing(self._kind, missing, link)

    def go_aside(self) -> None:
        pass

    def reject(self, error: DataRefused) -> None:
        (pending,) = self._pending
        if not pending.answered.done():
            pending.answered.set_exception(error)


class PostgresJournal:
    """The journal of one worker, over `link`, which nothing else uses, and `aside`. Calls `due_in` with the seconds
    until a suspended run falls due."""

    def __init__(
        self, link: Link, aside: Aside, *, due_in: Callable[[float], None], page: CounterPage | None = None
    ) -> None:
        self._link = link
        self._writer = Writer(link, aside)
        self._due_in = due_in
        self._page = page
        self._loop = asyncio.get_running_loop()
        self._work = asyncio.Event()
        self._offset = 0.0  # from the monotonic clock to that of the database, see `learn_time`
        self._sent = self._received = 0.0  # monotonic times of the statement whose answer is being taken
        self._waiting: defaultdict[EntryClass, list[_PendingEntry]] = defaultdict(list)
        self._turn = 0
        self._finished = self._parked = self._lost = 0

    def totals(self) -> tuple[int, int, int]:
        """Count the runs that have ended well, and as ERROR, in the database; and the entries dropped for a lost
        lease."""
        return self._finished, self._parked, self._lost

    # --- for the runs: see `Journal`

    def now(self) -> datetime:
        return datetime.fromtimestamp(time.monotonic() + self._offset, UTC)

    def submit(self, entry: JournalEntry[AnswerT]) -> asyncio.Future[AnswerT]:
        answered: asyncio.Future[AnswerT] = self._loop.create_future()
        self._waiting[type(entry)].append(_PendingEntry(entry, answered, self._turn))
        self._work.set()
        return answered

    def note_times(self, sent: float, received: float) -> None:
        """Note the monotonic times of the statement whose answer is taken next."""
        self._sent, self._received = sent, received

    # --- for the entries: see `JournalEffects`

    def learn_time(self, now: datetime) -> None:
        """Set the clock: the database said `now` between the sending and the receiving of the statement.

        The clock moves only as far as that proves it wrong: a statement that a lock or an outage kept waiting proves
        little. Where nothing is known it is late rather than early, but by then not behind `now`: what was due for the
        database is due here."""
        self._offset = min(max(self._offset, now.timestamp() - self._received), now.timestamp() - self._sent)

    def announce_due(self, due_at: datetime) -> None:
        self._due_in(max(0.0, (due_at - self.now()).total_seconds()))

    def count_end(self, lease: TaskLease, *, is_success: bool) -> None:
        if self._page is not None:
            self._page.count_ended_run(lease, is_success)
        if is_success:
            self._finished += 1
        else:
            self._parked += 1

    # --- the writer

    async def run(self) -> None:
        """Write what gathers, until cancelled. Raises `DatabaseRefused`."""
        try:
            while True:
                await self._work.wait()
                self._work.clear()
                await asyncio.sleep(0)  # a run that is released in this turn of the loop may have another entry
                self._turn += 1
                # A class that has nothing now has its turn next time: runs that have drifted apart meet again.
                for kind in self._waiting_kinds():
                    if batch := self._take_batch(kind):
                        await self._writer.write(_EntryBatch(self, kind, batch))
                    # A run that is released now may have an entry for a later class of this turn.
                    await asyncio.sleep(0)
                if self._waiting_kinds():
                    self._work.set()
        finally:
            await self._link.close()

    def _waiting_kinds(self) -> list[EntryClass]:
        """The classes that have entries, in the order of a turn."""
        return [kind for kind in STATEMENTS if self._waiting.get(kind)]

    def _take_batch(self, kind: EntryClass) -> list[_PendingEntry]:
        """Take entries for one statement: as many as fit, and one of each run where that matters."""
        waiting = self._waiting[kind]
        if CHECKS_INVARIANTS and waiting[0].turn < self._turn - 1:
            raise AssertionError(f"an entry {kind.__name__} was passed over: please report this")
        if not kind.is_once_per_run and kind.max_weight is None:
            batch = waiting[:MAX_ENTRIES]
            while len(batch) > 1 and kind.total_size([pending.entry for pending in batch]) > MAX_SIZE:
                batch = batch[: len(batch) // 2]
            self._leave(kind, waiting[len(batch) :])
            return batch
        batch, rest = [], []
        runs: set[UUID | None] = set()
        weight, max_weight, size = 0, kind.max_weight or 0, 0
        for pending in waiting:
            entry = pending.entry
            weight += entry.weight
            size += entry.size
            is_full = len(batch) >= MAX_ENTRIES or (batch and (weight > max_weight or size > MAX_SIZE))
            if is_full or (kind.is_once_per_run and entry.task_id in runs):
                rest.append(pending)
                continue
            batch.append(pending)
            runs.add(entry.task_id)
        self._leave(kind, rest)
        return batch

    def _leave(self, kind: EntryClass, rest: list[_PendingEntry]) -> None:
        """Leave entries that did not fit for the next turn."""
        self._waiting[kind] = rest
        if CHECKS_INVARIANTS:
            for pending in rest:
                pending.turn = self._turn

    async def settle_missing(self, kind: EntryClass, missing: list[_PendingEntry], link: Link) -> None:
        """Try those entries again whose task is only locked, and answer the others: their lease is gone."""
        leases = [pending.entry.lease for pending in missing]  # type: ignore[attr-defined]
        rows = await link.run("journal/ours", [lease.id for lease in leases], [lease.token for lease in leases])
        ours = {row[0] for row in rows}
        for pending, lease in zip(missing, leases, strict=True):
            if lease.id in ours:
                pending.tries += 1
                if pending.tries == LOGGED_TRY:
                    log.warning("database.locked", statement=kind.statement, run=lease.id, step=lease.label)
                pause = exponential_delay(INITIAL_BACKOFF, MAX_BACKOFF, pending.tries)
                self._loop.call_later(pause, self._try_again, kind, pending)
            elif not pending.answered.done():
                # After a second sending, the first one has probably released the run that is no longer ours.
                if pending.is_certain or not kind.releases_lease:
                    self._lost += 1
                    if self._page is not None:
                        self._page.count_lost([lease])
                    dropped = kind.statement.rpartition("/")[2]
                    log.warning("run.lost", run=lease.id, step=lease.label, dropped=dropped)
                    pending.answered.set_exception(RunStopped("the lease of the run was lost"))
                else:
                    pending.answered.set_result(None)

    def ask_for_rest(self, kind: EntryClass, pending: _PendingEntry, answer: PartialAnswer) -> None:
        """Keep a part of an answer, and ask for the rest in the next turn."""
        pending.parts.append(answer.found)
        pending.entry = answer.rest
        self._try_again(kind, pending)

    def _try_again(self, kind: EntryClass, pending: _PendingEntry) -> None:
        pending.turn = self._turn
        self._waiting[kind].append(pending)
        self._work.set()
