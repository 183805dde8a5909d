"""`pgtask web`: the console in a browser."""

from __future__ import annotations

import argparse
import asyncio
import importlib.util
import secrets
import socket
from collections.abc import Callable

from pgtask._cli.database import Database, find_database, load_configured_app
from pgtask._cli.from_option import add_from, addresses_of
from pgtask._cli.limit_words import breaker_words, cost_words, key_words, order_words, rate_words, state_words
from pgtask._cli.options import add_traceback, whole_number
from pgtask._cli.output import note, write_lines
from pgtask._cli.parser import Parser
from pgtask._cli.quantities import format_elapsed, format_number, format_size, format_time, relative_time
from pgtask._operator import operator_name
from pgtask._postgres.migrate import migrate
from pgtask.app import App
from pgtask.config import load_config
from pgtask.errors import ConfigError

__all__ = ["HELP", "SUMMARY", "add_arguments", "run"]

SUMMARY = "show the tasks in a browser"
HELP = """\
Serve pages that show what waits, runs, is parked and has run, until Ctrl-C: queues, tasks, runs as timelines, parked
tasks by cause, and with APP its state machine. Rates, and all about workers, are those of pgtask top. The pages change
nothing, unless --write: then stdout names a token, and a browser that has given it may retry, cancel, pause and resume.

    pgtask web shop:app
    pgtask web --read-dsn postgresql://replica/shop --write

Without --host, only programs of this host reach it. The pages have no password: give another host only behind a proxy
that has one. It needs the extra web: pip install 'pgtask-supervisor[web]'
"""

DEFAULT_PORT = 8321
FORMATS: dict[str, Callable[..., str]] = {
    "ago": relative_time,
    "time": format_time,
    "elapsed": format_elapsed,
    "rate": format_number,
    "size": format_size,
    "limit_rate": rate_words,
    "limit_cost": cost_words,
    "limit_breaker": breaker_words,
    "limit_order": order_words,
    "limit_state": state_words,
    "limit_key": key_words,
}
FRESH, MAX_GAP = 1.0, 30.0  # seconds for which a look is shown again; between two looks that a rate is of


def add_arguments(parser: Parser) -> None:
    parser.add_argument("app", nargs="?", metavar="APP", help="the app, as module:attribute, for its state machine")
    parser.add_argument("--host", default="127.0.0.1", metavar="HOST", help="where to listen (default: %(default)s)")
    port = whole_number(0, 65535)
    parser.add_argument(
        "--port", type=port, default=DEFAULT_PORT, metavar="PORT", help="0 for any that is free (default: %(default)s)"
    )
    parser.add_argument("--read-dsn", metavar="DSN", help="the database that pages read, such as a replica")
    parser.add_argument("--write", action="store_true", help="let a browser that has the token act")
    add_from(parser)
    add_traceback(parser)


def run(args: argparse.Namespace) -> int:
    from pgtask._observe.server import listen

    _check_libraries()
    addresses_of(args)
    app = _find_app(args.app)
    with listen((args.host, args.port), "--port") as listening:
        database = find_database(vars(args))
        asyncio.run(_serve(args, database, app, listening))
    return 0


def _check_libraries() -> None:
    """Raise `ConfigError` if a library for the pages is missing."""
    for name in ("starlette", "uvicorn", "jinja2"):
        if importlib.util.find_spec(name) is None:
            raise ConfigError(f"pgtask web needs the library {name}: pip install 'pgtask-supervisor[web]'")


def _find_app(reference: str | None) -> App | None:
    """Return the app that is named or configured, if any is."""
    if reference is None and load_config({}).app is None:
        return None
    return load_configured_app(reference)


async def _serve(args: argparse.Namespace, database: Database, app: App | None, listening: socket.socket) -> None:
    from pgtask._observe.looks import FleetLooks
    from pgtask._observe.web.chart import draw_machines
    from pgtask._observe.web.guard import LOOPBACK
    from pgtask._observe.web.server import serve_site
    from pgtask._observe.web.sessions import WebSessions
    from pgtask._observe.web.site import ActionKeys, Site, make_templates

    if database.is_embedded:
        await migrate(database.dsn)
    port = listening.getsockname()[1]
    token = secrets.token_urlsafe(18) if args.write else None
    reads, pooled = args.read_dsn or database.dsn, database.is_pooled
    site = Site(
        reading=WebSessions(reads, pooled=pooled),
        looks=FleetLooks(reads, pooled=pooled, addresses=addresses_of(args), fresh=FRESH, max_gap=MAX_GAP),
        templates=make_templates(FORMATS),
        charts=None if app is None else draw_machines(app),
        operator=f"{operator_name()} (web)",
        writing=WebSessions(database.dsn, pooled=database.is_pooled, writes=True) if args.write else None,
        keys=None if token is None else ActionKeys(token, port),
    )
    for sessions in (site.reading, site.writing):
        if sessions is not None:  # a database that refuses us ends the program, not a page
            async with sessions.session():
                pass
    is_loopback = args.host in LOOPBACK
    if not is_loopback:
        note(f"any program that reaches {args.host}:{port} can read the pages: they have no password")
    host = f"[{args.host}]" if ":" in args.host else args.host
    write_lines([f"http://{host}:{port}/", *([] if token is None else [f"token: {token}"])])
    await serve_site(site, listening, is_loopback=is_loopback)
