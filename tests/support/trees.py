"""Tasks that enqueue others in their outcomes: a tree, in which each node has a path of its own."""

from __future__ import annotations

import asyncio
import os
from datetime import timedelta
from pathlib import Path

from pgtask import App, Context, Done, Enqueue, Next, Task

__all__ = ["LEDGER", "Closes", "Fans", "Grows", "Node", "Rejects", "Tree", "Waits", "app", "size"]

LEDGER = (
    "CREATE TABLE ledger (step text)",
    """CREATE FUNCTION note() RETURNS trigger LANGUAGE plpgsql AS $$
    BEGIN INSERT INTO ledger VALUES (OLD.step); RETURN NULL; END $$""",
    "CREATE TRIGGER note AFTER DELETE ON pg_task FOR EACH ROW EXECUTE FUNCTION note()",
)
"""Notes each finished task, in the transaction that finishes it."""


class Tree(Task):
    """Nodes that have children, some of which go on to another step as they enqueue these."""


class Node(Tree):
    path: str
    widths: list[int]

    async def run(self, ctx: Context) -> Next[Closes] | Done:
        children = [Node(f"{self.path}.{number}", self.widths[1:]) for number in range((self.widths or [0])[0])]
        if len(self.path) % 2:
            return Done(enqueue=children)
        return Next(Closes(self.path), enqueue=children)


class Closes(Tree):
    path: str

    async def run(self, ctx: Context) -> Done:
        return Done()


class Grows(Tree):
    """Enqueues one more for each key. They run behind all tasks that are due."""

    keys: list[str]

    async def run(self, ctx: Context) -> Done:
        return Done(enqueue=(Enqueue(Closes(key), key=key, priority=-1) for key in self.keys))


class Fans(Tree):
    """Enqueues one that is due in so many seconds."""

    name: str
    seconds: float

    async def run(self, ctx: Context) -> Done:
        return Done(enqueue=[Enqueue(Closes(self.name), after=timedelta(seconds=self.seconds))])


class Waits(Tree):
    """Waits for a file, and then enqueues one that is due now, and one that is due soon."""

    file: str

    async def run(self, ctx: Context) -> Done:
        while not Path(self.file).exists():  # noqa: ASYNC110, ASYNC240
            await asyncio.sleep(0.01)
        return Done(enqueue=[Closes("now"), Enqueue(Closes("soon"), after=timedelta(seconds=0.5))])


class Rejects(Tree):
    """Enqueues one for a queue of which the database takes none."""

    async def run(self, ctx: Context) -> Done:
        return Done(enqueue=[Closes("a"), Enqueue(Closes("b"), queue="closed")])


def size(widths: list[int]) -> int:
    """Return the number of nodes of a tree."""
    nodes = total = 1
    for width in widths:
        nodes *= width
        total += nodes
    return total


app = App(Tree, archive=bool(os.environ.get("TREES_ARE_KEPT")))
