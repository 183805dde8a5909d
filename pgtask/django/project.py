"""The Django project: its app for a worker, and the database that its settings name.

    python -m pgtask.django.project

prints, for the supervisor and the commands, which do not import a project themselves, the DSN as JSON.

Invariant: no error here quotes a password.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping
from typing import Any
from urllib.parse import quote

import django
from django.conf import settings
from django.core.exceptions import ImproperlyConfigured

from pgtask._error_text import one_line, place_of
from pgtask._project import import_from_project
from pgtask.app import App, Lifespan
from pgtask.errors import AppLoadError

__all__ = ["dsn_of", "make_app", "pgtask_databases"]

# What we have as well. The other options are about the session of psycopg, which is not ours.
_OPTIONS = (
    *("sslmode", "sslcert", "sslkey", "sslrootcert", "sslcrl", "sslnegotiation", "passfile", "service"),
    *("target_session_attrs", "load_balance_hosts", "options", "krbsrvname", "gsslib"),
    *("keepalives_idle", "keepalives_interval", "keepalives_count", "tcp_user_timeout"),
)


def make_app(*tasks: Any, lifespan: Lifespan | None = None) -> App:
    """Set Django up by DJANGO_SETTINGS_MODULE, and return the app that runs its tasks, and those of pgtask beside them.

        app = make_app(Document, Crawl)

    Raises `AppLoadError` if Django cannot be set up.
    """
    try:
        if not settings.configured:
            import_from_project()
        django.setup()
        from pgtask.django.steps import DjangoTask
    except Exception as error:
        name = os.environ.get("DJANGO_SETTINGS_MODULE")
        of = f"the Django project {name}" if name else "Django, without DJANGO_SETTINGS_MODULE"
        raise AppLoadError(f"{of} cannot be set up: {one_line(error)}{place_of(error)}") from error
    return App(DjangoTask, *tasks, lifespan=lifespan)


def pgtask_databases() -> list[str]:
    """Return the aliases in DATABASES that our backends in TASKS use. Reads the settings only."""
    from django.utils.module_loading import import_string

    from pgtask.django.backend import PgtaskBackend

    found = []
    for backend in getattr(settings, "TASKS", {}).values():
        kind = import_string(backend["BACKEND"])
        if isinstance(kind, type) and issubclass(kind, PgtaskBackend):
            options = backend.get("OPTIONS", {})
            found.append(str(options.get("database", "default")) if isinstance(options, dict) else "default")
    return list(dict.fromkeys(found))


def dsn_of(alias: str) -> str:
    """Return the DSN of a database of the project. Raises `ImproperlyConfigured` if it is not PostgreSQL."""
    from django.db import connections

    if alias not in connections:
        names = ", ".join(map(repr, connections))
        raise ImproperlyConfigured(f"DATABASES has no {alias!r}; OPTIONS['database'] in TASKS may name: {names}")
    connection = connections[alias]
    if connection.vendor != "postgresql":
        raise ImproperlyConfigured(f"pgtask needs PostgreSQL, and DATABASES[{alias!r}] is {connection.vendor}")
    return _dsn_from(connection.settings_dict)


def _dsn_from(database: Mapping[str, Any]) -> str:
    """Return the DSN for an entry of DATABASES."""
    host, port = str(database.get("HOST") or ""), str(database.get("PORT") or "")
    user, password = str(database.get("USER") or ""), str(database.get("PASSWORD") or "")
    options = database.get("OPTIONS") or {}
    more = {name: str(options[name]) for name in _OPTIONS if options.get(name) is not None}
    if options.get("assume_role"):
        more["role"] = str(options["assume_role"])
    if host.startswith("/") or "," in host:  # the directory of a socket, or several hosts
        more["host"], host = host, ""
        if port:
            more["port"], port = port, ""
    elif ":" in host and "[" not in host:  # an address of version 6
        host = f"[{host}]"
    if user and quote(user, safe="") != user:
        more["user"], user = user, ""
    if password and not user:
        more["password"], password = password, ""
    login = f"{user}:{quote(password, safe='')}@" if password else f"{user}@" if user else ""
    query = "&".join(f"{name}={quote(value, safe='/')}" for name, value in more.items())
    place = f"{host}:{port}" if port else host
    return f"postgresql://{login}{place}/{quote(str(database.get('NAME') or ''), safe='')}" + (
        f"?{query}" if query else ""
    )


def _say() -> dict[str, str]:
    """Return what the supervisor asks for."""
    try:
        import_from_project()
        aliases = pgtask_databases()
        if len(aliases) > 1:
            names = ", ".join(aliases)
            return {"error": f"TASKS uses several databases ({names}): run a supervisor with --dsn for each"}
        return {"source": f"DATABASES[{aliases[0]!r}]", "dsn": dsn_of(aliases[0])} if aliases else {}
    except Exception as error:
        return {"error": f"{one_line(error)}{place_of(error)}"}


if __name__ == "__main__":
    answer, sys.stdout = sys.stdout, sys.stderr  # what the settings print is no part of it
    json.dump(_say(), answer)
