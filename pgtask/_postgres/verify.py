"""The live schema compared with what the migrations make, and the privileges that a role needs.

Invariants: it only reads the catalog; what is not of pgtask, and what the migrations of pg_task have left beside, is no
difference.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import msgspec

from pgtask._postgres.connection import map_errors
from pgtask._postgres.store import statement

__all__ = [
    "MANIFEST",
    "OPERATOR",
    "READER",
    "WORKER",
    "Difference",
    "Thing",
    "find_differences",
    "find_missing_grants",
    "read_live",
    "role_exists",
]

MANIFEST = Path(__file__).parent / "sql" / "verify" / "made.json"
"""The file of what the migrations make, written by `ci/manifest`."""

Privileges = Mapping[str, Sequence[str]]
"""The privileges on each table."""

_READ = (
    "pg_task",
    "pg_task_runs",
    "pg_task_checkpoints",
    "pg_task_signals",
    "pg_task_archive",
    "pg_task_pauses",
    "pg_task_schedules",
    "pg_task_limits",
    "pg_task_limit_keys",
    "pg_task_groups",
    "pg_task_group_counts",
    "pg_task_schema",
)
READER: Privileges = dict.fromkeys(_READ, ("SELECT",))
"""The privileges of a role that only looks: `pgtask list`, `stats`, `check`."""

WORKER: Privileges = {
    "pg_task": ("SELECT", "INSERT", "UPDATE", "DELETE"),
    "pg_task_runs": ("SELECT", "INSERT", "UPDATE"),
    "pg_task_checkpoints": ("SELECT", "INSERT", "UPDATE", "DELETE"),
    "pg_task_signals": ("SELECT", "INSERT", "UPDATE", "DELETE"),
    "pg_task_stops": ("SELECT",),
    "pg_task_pauses": ("SELECT",),
    "pg_task_limits": ("SELECT", "INSERT", "UPDATE"),
    "pg_task_limit_keys": ("SELECT", "INSERT", "UPDATE", "DELETE"),
    "pg_task_groups": ("SELECT", "INSERT", "UPDATE"),
    "pg_task_group_counts": ("SELECT", "INSERT", "UPDATE"),
    "pg_task_group_results": ("SELECT", "INSERT"),
    "pg_task_schema": ("SELECT",),
}
"""The privileges of a role of workers and clients, without an archive and without schedules."""

OPERATOR: Privileges = {
    **WORKER,
    "pg_task_runs": ("SELECT", "INSERT", "UPDATE", "DELETE"),
    "pg_task_archive": ("SELECT", "UPDATE", "DELETE"),
    "pg_task_groups": ("SELECT", "INSERT", "UPDATE", "DELETE"),
    "pg_task_group_counts": ("SELECT", "INSERT", "UPDATE", "DELETE"),
    "pg_task_group_results": ("SELECT", "INSERT", "DELETE"),
    "pg_task_pauses": ("SELECT", "INSERT", "UPDATE", "DELETE"),
    "pg_task_actions": ("SELECT", "INSERT", "UPDATE", "DELETE"),
    "pg_task_schedules": ("SELECT", "UPDATE"),
}
"""The privileges of a person who changes tasks in bulk, pauses and prunes."""

REPAIR = "pgtask verify --repair"
_FUNCTIONS = ("pg_task_workflow", "pg_task_paused_until", "pg_task_family", "pg_task_scoped_key", "pg_task_has")
_BODY, _NOT_NULL, _IDENTITY = " MD5 ", " NOT NULL", " GENERATED AS IDENTITY"


class Thing(NamedTuple):
    """A thing of the schema: a table, column, default, function, trigger, index, constraint or comment."""

    kind: str
    on_table: str
    name: str
    definition: str
    wrong: str | None = None

    @property
    def key(self) -> tuple[str, str, str]:
        return self.kind, self.on_table, self.name

    @property
    def label(self) -> str:
        match self.kind:
            case "column":
                return f"column {self.on_table}.{self.name}"
            case "default":
                return f"default of {self.on_table}.{self.name}"
            case "comment":
                return f"comment of {self.name}"
        return f"{self.kind} {self.name}"


class Difference(msgspec.Struct, frozen=True):
    """A difference of the live schema: the thing as it should be, what is wrong with it, and the remedy.

    `repair`: how `pgtask verify --repair` repairs it; None if a person must."""

    thing: Thing
    problem: str
    remedy: str
    repair: Literal["migrate", "replace", "build", "rebuild"] | None = "migrate"


async def read_live(connection: Any) -> list[Thing]:
    """Return all things of the live schema."""
    with map_errors():
        return [Thing(*row) for row in await connection.fetch(statement("verify/live"))]


async def find_differences(connection: Any) -> list[Difference]:
    """Compare the live schema with the manifest."""
    live = {thing.key: thing for thing in await read_live(connection)}
    made = [Thing(*one) for one in msgspec.json.decode(MANIFEST.read_bytes(), type=list[tuple[str, str, str, str]])]
    lost = {name for thing in made if thing.key not in live for name in _parts_named(thing)}
    found = (_compare(thing, live.get(thing.key)) for thing in made if not lost & _owners_of(thing))
    return [difference for difference in found if difference is not None]


def _parts_named(thing: Thing) -> set[str]:
    """Return the names under which the loss of a thing includes others: those that are on it."""
    match thing.kind:
        case "table":
            return {thing.name}
        case "column":
            return {f"{thing.on_table}.{thing.name}"}
        case "function":
            return {thing.name.partition("(")[0] + "()"}
    return set()


def _owners_of(thing: Thing) -> set[str]:
    """Return the names of the things that a thing is on."""
    match thing.kind:
        case "table":
            return set()
        case "default":
            return {thing.on_table, f"{thing.on_table}.{thing.name}"}
        case "comment":
            return {thing.on_table, thing.name}
    return {thing.on_table}


def _compare(made: Thing, live: Thing | None) -> Difference | None:
    if live is None:
        return Difference(made, "is missing", REPAIR, "build" if made.kind == "index" else "migrate")
    if live.wrong is not None:
        return Difference(made, live.wrong, REPAIR, "rebuild" if made.kind == "index" else "migrate")
    if live.definition == made.definition:
        return None
    if made.kind in ("table", "column", "constraint"):
        return Difference(made, f"is {live.definition}, not {made.definition}", _sql_remedy(made, live), None)
    problem = "differs" if made.kind == "comment" else f"is {live.definition}, not {made.definition}"
    if made.kind == "function":
        is_body = live.definition.partition(_BODY)[0] == made.definition.partition(_BODY)[0]
        problem = "has another body" if is_body else f"is {_head(live)}, not {_head(made)}"
    return Difference(made, problem, REPAIR, "migrate" if made.kind == "comment" else "replace")


def _head(function: Thing) -> str:
    return function.definition.partition(_BODY)[0]


def _sql_remedy(made: Thing, live: Thing) -> str:
    table, name = made.on_table, made.name
    if made.kind == "table":
        return f"ALTER TABLE {table} SET LOGGED"
    if made.kind == "constraint":
        return f"ALTER TABLE {table} DROP CONSTRAINT {name}, ADD CONSTRAINT {name} {made.definition}"
    wanted, found = _Column.of(made), _Column.of(live)
    changes = []
    if wanted.type != found.type:
        changes.append(f"ALTER {name} TYPE {wanted.type} USING {name}::{wanted.type}")
    if wanted.is_required != found.is_required:
        changes.append(f"ALTER {name} {'SET' if wanted.is_required else 'DROP'} NOT NULL")
    if wanted.is_identity and not found.is_identity:
        changes.append(f"ALTER {name} ADD GENERATED ALWAYS AS IDENTITY")
    return f"ALTER TABLE {table} {', '.join(changes)}"


class _Column(NamedTuple):
    """The definition of a column."""

    type: str
    is_required: bool
    is_identity: bool

    @staticmethod
    def of(thing: Thing) -> _Column:
        plain = thing.definition.removesuffix(_IDENTITY)
        type = plain.removesuffix(_NOT_NULL)
        return _Column(type, plain != type, plain != thing.definition)


async def role_exists(connection: Any, role: str) -> bool:
    return bool(await connection.fetchval("SELECT EXISTS (SELECT FROM pg_roles WHERE rolname = $1)", role))


async def find_missing_grants(connection: Any, role: str | None, needed: Privileges) -> list[tuple[str, str]]:
    """Return what a role lacks, as pairs of a thing and the GRANT for it. `role` is the current one by default."""
    tables = [table for table, privileges in needed.items() for _ in privileges]
    privileges = [one for privileges in needed.values() for one in privileges]
    with map_errors():
        rows = await connection.fetch(statement("verify/privileges"), role, tables, privileges, list(_FUNCTIONS))
    return [(row["what"], row["remedy"]) for row in rows]
