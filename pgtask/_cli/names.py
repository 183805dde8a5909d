"""Names of tasks and runs on the command line: an id, or enough of its first or last digits to be unique.

Invariant: a name stands for one task or for none; where it fits several, they are listed and none is chosen.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any
from uuid import UUID

import msgspec

from pgtask._postgres.runs import read_statuses
from pgtask._postgres.task_status import step_label
from pgtask._postgres.tasks import find_ids, show_tasks
from pgtask.errors import ConfigError

__all__ = ["NO_SUCH_RUN", "NO_SUCH_TASK", "Name", "resolve_names"]

MIN_DIGITS = 8
CERTAIN_DIGITS = 12  # so many first digits are never the last ones of another task as well
MAX_SHOWN = 10
NO_SUCH_TASK = "there is no such task: finished, cancelled, or never existed"
NO_SUCH_RUN = "there is no such run"


class Name(msgspec.Struct, frozen=True):
    """The typed text, and the ids it may stand for: those from `first` to `last`, or those that end with `ending`."""

    text: str
    first: UUID
    last: UUID
    ending: str
    digits: int
    is_run: bool

    @classmethod
    def parse(cls, text: str, *, is_run: bool = False) -> Name:
        """Raise `ConfigError` for a text that cannot name a task."""
        digits = text.replace("-", "").lower()
        try:
            if not MIN_DIGITS <= len(digits) <= 32 or not digits.isascii():
                raise ValueError
            first, last = UUID(digits.ljust(32, "0")), UUID(digits.ljust(32, "f"))
            ending = str(UUID(digits.rjust(32, "0")))
        except ValueError:
            raise ConfigError(
                f"{text} is not an id, nor the first {MIN_DIGITS} or more digits of one, nor the last"
            ) from None
        while len(ending.replace("-", "")) > len(digits):
            ending = ending[1:]
        return cls(text, first, last, ending.lstrip("-"), len(digits), is_run)

    async def resolve(self, connection: Any) -> UUID | list[str]:
        """Return the id, of which all digits may be given without such a task; or lines that say why none was found."""
        if self.first == self.last:
            return self.first
        ids = await self._find_ids(connection, None) if self.digits >= CERTAIN_DIGITS else []
        ids = ids or await self._find_ids(connection, self.ending)
        if len(ids) == 1:
            return ids[0]
        if ids:
            return await self._list_candidates(connection, ids)
        return [f"{self.text}: {NO_SUCH_RUN if self.is_run else NO_SUCH_TASK}"]

    async def _find_ids(self, connection: Any, ending: str | None) -> list[UUID]:
        return await find_ids(connection, self.first, self.last, ending, limit=MAX_SHOWN + 1, runs=self.is_run)

    async def _list_candidates(self, connection: Any, ids: list[UUID]) -> list[str]:
        shown = ids[:MAX_SHOWN]
        if self.is_run:
            lines = [f"  {run.id}  {run.state}  {run.name or '-'}" for run in await read_statuses(connection, shown)]
        else:
            lines = [f"  {row.id}  {row.state}  {step_label(row.step)}" for row in await show_tasks(connection, shown)]
        kind = "run" if self.is_run else "task"
        more = [f"  and more than {MAX_SHOWN} in all"] if len(ids) > MAX_SHOWN else []
        return [f"{self.text}: more than one {kind} has these digits, give more of them:", *lines, *more]


async def resolve_names(connection: Any, names: Sequence[Name]) -> tuple[list[UUID], list[str]]:
    """Return the ids of the names that stand for one, and a line or more for each of the others."""
    ids, refusals = [], []
    for name in names:
        found = await name.resolve(connection)
        if isinstance(found, UUID):
            ids.append(found)
        else:
            refusals += found
    return ids, refusals
