"""Prepared statements whose plans EXPLAIN shows, and connections with settings."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any, NamedTuple

from pgtask._postgres.store import statement


class Plan(NamedTuple):
    """The plan of one execution, by EXPLAIN (ANALYZE, BUFFERS)."""

    nodes: list[dict[str, Any]]
    buffers: int
    triggers: set[str]

    @property
    def kinds(self) -> set[str]:
        return {node["Node Type"] for node in self.nodes}

    @property
    def indexes(self) -> set[str]:
        return {node["Index Name"] for node in self.nodes if "Index Name" in node}

    @property
    def rows(self) -> int:
        """The rows that all nodes have read: those that they passed on, and those that they removed."""
        removed = ("Rows Removed by Filter", "Rows Removed by Join Filter", "Rows Removed by Index Recheck")
        return sum(
            round(node["Actual Loops"] * (node["Actual Rows"] + sum(node.get(name, 0) for name in removed)))
            for node in self.nodes
        )


def flat(node: dict[str, Any]) -> Iterator[dict[str, Any]]:
    yield node
    for child in node.get("Plans", ()):
        yield from flat(child)


def literal(value: Any, kind: str) -> str:
    if value is None:
        return "NULL"
    if isinstance(value, list):
        return f"ARRAY[{', '.join(literal(item, kind.removesuffix('[]')) for item in value)}]::{kind}"
    return "'{}'::{}".format(str(value).replace("'", "''"), kind)


class Session:
    """A connection with the statements prepared by name, so that EXPLAIN EXECUTE shows its stored plan."""

    def __init__(self, db: Any) -> None:
        self.db = db
        self.kinds: dict[str, list[str]] = {}

    async def prepare(self, names: list[str]) -> None:
        for name in names:
            prepared = await self.db.prepare(statement(name))
            self.kinds[name] = [parameter.name for parameter in prepared.get_parameters()]
            await self.db.execute(f"PREPARE {name.replace('/', '_')} AS {statement(name)}")

    async def explain(self, name: str, *args: Any) -> Plan:
        """Run a statement in a transaction that is rolled back, and return its plan."""
        values = ", ".join(map(literal, args, self.kinds[name]))
        query = (
            f"EXPLAIN (ANALYZE, BUFFERS, FORMAT JSON) EXECUTE {name.replace('/', '_')}{f'({values})' if args else ''}"
        )
        transaction = self.db.transaction()
        await transaction.start()
        try:
            (found,) = json.loads(await self.db.fetchval(query))
        finally:
            await transaction.rollback()
        plan = found["Plan"]
        triggers = {trigger["Trigger Name"] for trigger in found["Triggers"]}
        return Plan(list(flat(plan)), plan["Shared Hit Blocks"] + plan["Shared Read Blocks"], triggers)
