"""The entries of a journal that only read: their statements send so many bytes at a time, and the journal asks for the
rest."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from typing import Any
from uuid import UUID

from pgtask._workflow.columns import sparse
from pgtask._workflow.entry import JournalEffects, JournalEntry, PartialAnswer
from pgtask._workflow.values import Checkpoint, History, RunResult

__all__ = ["CollectResults", "LoadHistory"]


class LoadHistory(JournalEntry[History], frozen=True, eq=False):
    """Read the history of a run; the checkpoints behind the number `after`, if it has one."""

    statement = "journal/load"
    run: UUID
    after: int | None = None

    @staticmethod
    def parameters(batch: Sequence[LoadHistory]) -> list[Any]:
        return [[entry.run for entry in batch], sparse([entry.after for entry in batch])]

    @staticmethod
    def answers(batch: Sequence[LoadHistory], rows: list[Any]) -> list[History | PartialAnswer]:
        histories: dict[UUID, History] = {}
        cut: dict[UUID, int] = {}
        for run, wakeup_at, now, is_known, version, state, is_left, number, *rest in rows:
            history = histories.get(run)
            if history is None:
                history = histories[run] = History(wakeup_at, is_known, version, state, [], now)
            if is_left:
                cut.setdefault(run, number - 1)
            elif number is not None:
                history.checkpoints.append(Checkpoint(number, *rest))
        return [
            PartialAnswer(histories[entry.run], LoadHistory(entry.run, cut[entry.run]))
            if entry.run in cut
            else histories[entry.run]
            for entry in batch
        ]

    @staticmethod
    def join(parts: Sequence[History]) -> History:
        # Its wakeup_at is as old as its oldest part: so what has come since counts as not seen. Its time is that of the
        # statement whose answer the journal takes.
        checkpoints = list(chain.from_iterable(part.checkpoints for part in parts))
        return parts[0]._replace(checkpoints=checkpoints, seen_at=parts[-1].seen_at)

    def complete(self, answer: History, effects: JournalEffects) -> None:
        effects.learn_time(answer.seen_at)


class CollectResults(JournalEntry[dict[UUID, RunResult]], frozen=True, eq=False):
    """Read the results of those of the runs that have ended."""

    statement = "journal/collect"
    max_weight = 10_000
    runs: Sequence[UUID]

    @property
    def weight(self) -> int:
        return len(self.runs)

    @staticmethod
    def parameters(batch: Sequence[CollectResults]) -> list[Any]:
        return [list(dict.fromkeys(chain.from_iterable(entry.runs for entry in batch)))]

    @staticmethod
    def answers(batch: Sequence[CollectResults], rows: list[Any]) -> list[dict[UUID, RunResult] | PartialAnswer]:
        left = {UUID(int=run.int) for run, is_left, *_ in rows if is_left}
        ended = {UUID(int=run.int): RunResult(*result) for run, is_left, *result in rows if not is_left and result[0]}
        answers: list[Any] = [{run: ended[run] for run in entry.runs if run in ended} for entry in batch]
        if left:
            for at, entry in enumerate(batch):
                if missing := [run for run in entry.runs if run in left]:
                    answers[at] = PartialAnswer(answers[at], CollectResults(missing))
        return answers

    @staticmethod
    def join(parts: Sequence[dict[UUID, RunResult]]) -> dict[UUID, RunResult]:
        return {run: result for part in parts for run, result in part.items()}
