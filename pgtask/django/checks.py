"""The checks of a backend's settings, for `manage.py check`: each error names the setting and the remedy.

Invariant: nothing here connects to a database.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from django.core.checks import CheckMessage, Error
from django.db import connections

from pgtask._dsn import check_dsn
from pgtask._nearest import did_you_mean
from pgtask.django.project import dsn_of
from pgtask.policy import check_queue

__all__ = ["OPTION_TYPES", "option_errors", "queue_errors"]

OPTION_TYPES: dict[str, tuple[type[Any], str]] = {
    "database": (str, "the name of an entry of DATABASES, as a text"),
    "keep_results": (bool, "True or False"),
}


def option_errors(alias: str, options: Any) -> Iterator[CheckMessage]:
    """Yield an error for each wrong option of the backend with an alias in TASKS."""
    place = f"TASKS[{alias!r}]['OPTIONS']"
    if not isinstance(options, dict):
        yield Error(f"{place} is of type {type(options).__name__}", hint="Make it a dict.", id="pgtask.E004")
        return
    is_known = True
    for name, value in options.items():
        if name not in OPTION_TYPES:
            meant = did_you_mean(str(name), OPTION_TYPES).removeprefix("; d")
            hint = f"D{meant}" if meant else f"Leave it out: the options are {' and '.join(OPTION_TYPES)}."
            yield Error(f"{place} has no option {name!r}", hint=hint, id="pgtask.E005")
        elif not isinstance(value, OPTION_TYPES[name][0]):
            is_known = is_known and name != "database"
            text = f"{place}[{name!r}] is of type {type(value).__name__}"
            yield Error(text, hint=f"Write {OPTION_TYPES[name][1]}.", id="pgtask.E006")
    if is_known:
        yield from _database_errors(place, options.get("database", "default"))


def _database_errors(place: str, database: str) -> Iterator[CheckMessage]:
    setting = f"{place}['database']"
    others = [name for name in connections if connections[name].vendor == "postgresql"]
    choice = f"Name one that is PostgreSQL as {setting}: {', '.join(map(repr, others))}." if others else None
    if database not in connections:
        text = f"{setting} is {database!r}, and DATABASES has no such entry"
        hint = choice or f"Add {database!r} to DATABASES, with the engine django.db.backends.postgresql."
        yield Error(text, hint=hint, id="pgtask.E001")
    elif (vendor := connections[database].vendor) != "postgresql":
        text = f"{setting} is {database!r}, and DATABASES[{database!r}] is {vendor}; pgtask needs PostgreSQL"
        hint = choice or f"Give DATABASES[{database!r}] the engine django.db.backends.postgresql."
        yield Error(text, hint=hint, id="pgtask.E002")
    else:
        try:
            check_dsn(dsn_of(database))
        except ValueError as error:
            text = f"the workers cannot use DATABASES[{database!r}]: {error}"
            yield Error(text, hint=f"Correct that entry, or name another one as {setting}.", id="pgtask.E007")


def queue_errors(alias: str, queues: Any) -> Iterator[CheckMessage]:
    """Yield an error for each queue that cannot be named so."""
    for queue in sorted(queues, key=str):
        try:
            check_queue(queue)
        except ValueError as error:
            hint = "Give the queue another name."
            yield Error(f"TASKS[{alias!r}]['QUEUES']: {error}", hint=hint, id="pgtask.E003")
