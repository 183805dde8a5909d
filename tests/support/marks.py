"""The marks that steps and workflows leave in the table `mark`, so that a second run of them shows."""

from __future__ import annotations

from typing import Any

MARKS = """
    CREATE TABLE IF NOT EXISTS mark (
        task uuid, run uuid, step text, attempt int, pid int DEFAULT 0, at timestamptz DEFAULT clock_timestamp()
    )
"""


class MemoryMarks:
    """A stand-in for `ctx.db`, with the marks in a list."""

    def __init__(self) -> None:
        self.rows: list[tuple[Any, ...]] = []

    async def execute(self, query: str, *args: Any) -> None:
        self.rows.append(args)

    @property
    def steps(self) -> list[str]:
        return [row[1] for row in self.rows]
