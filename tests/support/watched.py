"""A journal whose entries a test watches, and whose answers to checkpoints it may hold back."""

from __future__ import annotations

import asyncio
from datetime import datetime
from typing import Any

from fix_stores import World

from pgtask._workflow.entries import EndRun, JournalEntry, RecordCheckpoint, SpawnChildren, Suspend, TakeSignal
from pgtask._workflow.journal import Journal


class WatchedJournal(Journal):
    """Notes in `events` each entry with an effect, and that it is durable. `may_answer`: checkpoints get answers."""

    def __init__(self, journal: Journal) -> None:
        self._journal = journal
        self.events: list[str] = []
        self.may_answer = asyncio.Event()
        self.may_answer.set()

    def now(self) -> datetime:
        return self._journal.now()

    def submit(self, entry: JournalEntry[Any]) -> asyncio.Future[Any]:
        answered = self._journal.submit(entry)
        if isinstance(entry, RecordCheckpoint) and not self.may_answer.is_set():
            answered = asyncio.ensure_future(self._answer_late(answered))
        if what := _name_of(entry):
            self.events.append(what)
            answered.add_done_callback(lambda answer: self._note_answer(what, answer))
        return answered

    def _note_answer(self, what: str, answer: asyncio.Future[Any]) -> None:
        if not answer.cancelled():
            self.events.append(f"{what}: {'lost' if answer.exception() else 'durable'}")

    async def _answer_late(self, answered: asyncio.Future[Any]) -> Any:
        await self.may_answer.wait()
        return await answered


def _name_of(entry: JournalEntry[Any]) -> str:
    if isinstance(entry, Suspend):
        return "suspend"
    if isinstance(entry, EndRun):
        carried = ", ".join(one.name for one in entry.checkpoints)
        return f"end with {carried}" if carried else "end"
    if isinstance(entry, RecordCheckpoint | SpawnChildren | TakeSignal):
        return f"{entry.statement.removeprefix('journal/')} {entry.checkpoint.name}"
    return ""


def watch(world: World) -> WatchedJournal:
    """Watch the journal of a world from now on."""
    world.journal = watched = WatchedJournal(world.journal)
    return watched


def watch_statements(world: World) -> list[str]:
    """Return the list to which the journal of a world in Postgres adds the name of each statement that it sends."""
    link: Any = world.journal._link  # type: ignore[attr-defined]
    names: list[str] = []
    send = link.run

    async def run(name: str, *args: Any, **options: Any) -> Any:
        names.append(name.removeprefix("journal/"))
        return await send(name, *args, **options)

    link.run = run
    return names
