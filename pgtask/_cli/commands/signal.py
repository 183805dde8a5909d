"""`pgtask signal`: send a signal to a run.

Invariant: a signal that was sent is durable when the command ends.
"""

from __future__ import annotations

import argparse
import sys
from typing import Any

import msgspec

from pgtask._cli.database import load_configured_app, with_connection
from pgtask._cli.names import Name
from pgtask._cli.options import ID_HELP
from pgtask._cli.output import note, note_failures, write_lines
from pgtask._cli.parser import Parser
from pgtask._cli.signal_types import check_signal
from pgtask._postgres.runs import read_statuses, send_signal
from pgtask.app import App
from pgtask.config import load_config
from pgtask.errors import AppLoadError, ConfigError, RunNotFound
from pgtask.workflow import check_name

__all__ = ["HELP", "SUMMARY", "add_arguments", "run"]

SUMMARY = "send a signal to a run"
HELP = """\
Send a signal to a run. It is kept until the run waits for one of this name. The JSON is its value (null without it);
- reads it from stdin.

    pgtask signal 4706f1ca approval '{"approved": true}'
"""


def add_arguments(parser: Parser) -> None:
    parser.add_argument("id", metavar="ID", help=ID_HELP)
    parser.add_argument("name", metavar="NAME", help="what the run waits for, or will wait for")
    parser.add_argument("value", nargs="?", default="null", metavar="JSON", help="the value that is sent")


def run(args: argparse.Namespace) -> int:
    target, name = Name.parse(args.id, is_run=True), check_name("signal", args.name, ConfigError)
    text = sys.stdin.read() if args.value == "-" else args.value
    try:
        payload = msgspec.json.format(text, indent=-1)
    except msgspec.DecodeError as error:
        raise ConfigError(f"the value of the signal is not valid JSON: {error}") from None

    app = _load_known_app()

    async def check_and_send(connection: Any) -> str | list[str]:
        found = await target.resolve(connection)
        if isinstance(found, list):
            return found
        before = await read_statuses(connection, [found])
        if app is not None and before:
            check_signal(app.workflows.get(before[0].name or "", ()), name, payload)
        if await send_signal(connection, found, name, payload):
            return _describe_sent(name, before[0].waits_on if before else None)
        return [f"{target.text}: finished, cancelled, or never existed; the signal was not sent"]

    try:
        sent = with_connection(args, check_and_send)
    except RunNotFound as error:
        return note_failures([str(error)])
    if isinstance(sent, list):
        return note_failures(sent)
    write_lines([sent])
    return 0


def _load_known_app() -> App | None:
    """Return the configured app, which knows the types of its signals; None where it is not configured or not
    loadable."""
    if load_config().app is None:
        return None
    try:
        return load_configured_app(None)
    except AppLoadError as error:
        note(f"the value of the signal is not checked: {error}")
        return None


def _describe_sent(name: str, waits_on: str | None) -> str:
    """Return the line of a signal that was sent; it shows where its name may be wrong."""
    if waits_on is None:
        return "sent; kept until the run waits for it"
    if f"signal {name}" in waits_on.split(", "):
        return "sent"
    return f"sent; kept until the run waits for it: now it waits for {waits_on}"
