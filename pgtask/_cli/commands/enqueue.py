"""`pgtask enqueue`: read a step from the command line, and enqueue it.

Invariant: a step that a worker could not decode, or would decode into other values than were typed, is refused here.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import sys
from datetime import datetime, timedelta
from typing import Any

import msgspec

from pgtask._cli.database import Database, find_database, load_configured_app
from pgtask._cli.key_options import add_key, check_key_options, describe_outcome, key_options
from pgtask._cli.options import TIME_HELP, add_traceback, parse_seconds
from pgtask._cli.output import OutputError, note, write_lines
from pgtask._cli.parser import Parser
from pgtask._fastpath import Codec
from pgtask._ids import TaskId
from pgtask._nearest import did_you_mean
from pgtask._postgres.migrate import migrate
from pgtask._postgres.tasks import find_step, open_connection
from pgtask._traces import adopt_environment
from pgtask._validate import encode
from pgtask.app import App, StepDefinition
from pgtask.client import Client
from pgtask.config import load_config
from pgtask.errors import ConfigError, DecodeError, EnqueueError
from pgtask.task import Task
from pgtask.task_function import CALL
from pgtask.workflow import STEP, Workflow

__all__ = ["HELP", "SUMMARY", "add_arguments", "run"]

SUMMARY = "enqueue a task"
HELP = """\
Enqueue a task and print its id. The JSON holds the step's fields; it is checked as a worker would decode it, before
anything is sent. Without it the fields take their defaults; - reads it from stdin. If another task has the key, stderr
says what became of it, and the id is that of the task that has the step now.

    pgtask enqueue greetings:app ReadName \\
        '{"filename": "name.txt"}' --delay 5m
"""


def add_arguments(parser: Parser) -> None:
    parser.usage = "pgtask enqueue [APP] STEP [JSON] [options]"
    parser.add_argument(
        "words",
        nargs="+",
        metavar="[APP] STEP [JSON]",
        help="APP is module:attribute (default: PGTASK_APP); STEP is ReadName or Greeter.ReadName, or the name of a "
        "workflow or a @task",
    )
    when = parser.add_mutually_exclusive_group()
    when.add_argument("--delay", type=parse_seconds, metavar="TIME", help=f"due after that time: {TIME_HELP}")
    when.add_argument("--at", metavar="WHEN", help="due at a time, as 2026-12-24T18:00:00+01:00")
    parser.add_argument("-q", "--queue", metavar="NAME", help="its queue (default: the step's)")
    parser.add_argument("--priority", type=int, metavar="N", help="its priority (default: the step's)")
    parser.add_argument("--expires", type=parse_seconds, metavar="TIME", help="no worker starts it after that time")
    add_key(parser)
    add_traceback(parser)


def run(args: argparse.Namespace) -> int:
    app, name, text = _split_words(args.words)
    loaded = load_configured_app(app)
    definition = _find_step(loaded, name)
    step = _decode_step(definition, _read_stdin() if text == "-" else text)
    flow = loaded.workflows[definition.task][-1] if definition.task in loaded.workflows else None
    at = None if args.at is None else _parse_time(args.at)
    check_key_options(args, is_run=flow is not None)
    _check_expires(args, is_run=flow is not None)
    database = find_database(vars(args), creates=True)
    with adopt_environment(os.environ):
        task, remark = asyncio.run(_insert_task(args, database, step, flow, at))
    try:
        write_lines([str(task)])
    except OutputError as error:  # a script that does not learn this would enqueue it twice
        note(f"task {task} is enqueued, but {error}")
        return error.code
    if remark is not None:
        note(remark)
    return 0


def _split_words(words: list[str]) -> tuple[str | None, str, str | None]:
    """Return APP, STEP and JSON of `[APP] STEP [JSON]`; an app has a colon in it, and a step has none."""
    app = words.pop(0) if len(words) == 3 or ":" in words[0] else None
    if len(words) not in (1, 2):
        raise ConfigError("give [APP] STEP [JSON] (see pgtask enqueue --help)")
    return app, words[0], words[1] if len(words) == 2 else None


def _find_step(app: App, name: str) -> StepDefinition:
    """Return the step called `ReadName` or `Greeter.ReadName`. Raises `EnqueueError`, which lists all steps."""
    if name in app.workflows:
        name = f"{name}.{STEP}"
    if name in app.functions and all(definition.name != name for definition in app):
        name = f"{name}.{CALL}"
    found = [definition for definition in app if name in (definition.name, definition.label)]
    if len(found) == 1:
        return found[0]
    if found:
        choice = ", ".join(definition.label for definition in found)
        raise EnqueueError(f"step {name} is ambiguous: give one of {choice}")
    labels = [definition.label for definition in app]
    names = [*(definition.name for definition in app), *labels, *app.functions, *app.workflows]
    meant = did_you_mean(name, names)
    raise EnqueueError(f"there is no step {name} in this app; it has {', '.join(labels)}{meant}")


def _decode_step(definition: StepDefinition, text: str | None) -> Task:
    """Return the step whose fields are the JSON `text`; without one, all its defaults. Raises `EnqueueError`."""
    codec = Codec(definition.cls, definition.task, definition.name, definition.transparent)
    if text is None:
        text = "{}" if definition.fields and not definition.transparent else "null"
    data = text.encode("utf-8", "surrogateescape")
    try:
        msgspec.json.decode(data)
    except msgspec.DecodeError as error:
        raise EnqueueError(f"{text!r:.80} is not JSON ({error}); {_show_example(definition)}") from None
    if not definition.transparent:
        _refuse_unknown_fields(definition, text)  # first: a mistyped field is also a missing one
    try:
        return codec.decode(data)
    except DecodeError as error:
        raise EnqueueError(f"step {error}") from error


def _show_example(definition: StepDefinition) -> str:
    if not definition.fields:
        return f"step {definition.label} has no fields: leave it out"
    first = msgspec.structs.fields(definition.cls)[0]
    sample = 1 if first.type in (int, float) else "text"
    value = sample if definition.transparent else {first.encode_name: sample}
    return f"for example '{json.dumps(value)}'"


def _refuse_unknown_fields(definition: StepDefinition, text: str) -> None:
    """Raise `EnqueueError` for unknown fields. A worker ignores them, so that old code takes new fields; on a command
    line they are typing errors."""
    given = msgspec.json.decode(text)
    if not isinstance(given, dict):
        return
    known = (*definition.cls.__struct_encode_fields__, definition.cls.__struct_config__.tag_field)
    for name in given:
        if name not in known:
            fields = ", ".join(definition.cls.__struct_encode_fields__) or "none"
            meant = did_you_mean(name, filter(None, known))
            raise EnqueueError(f"step {definition.label} has no field {name!r}; its fields: {fields}{meant}")


def _parse_time(text: str) -> datetime:
    """Return an ISO time with its zone. Raises `EnqueueError`."""
    try:
        time = datetime.fromisoformat(text)
    except ValueError:
        raise EnqueueError(f"--at {text}: expected a time such as 2026-12-24T18:00:00+01:00") from None
    if time.tzinfo is None:
        raise EnqueueError(f"--at {text}: has no time zone; add Z or an offset such as +01:00")
    return time


def _check_expires(args: argparse.Namespace, *, is_run: bool) -> None:
    if args.expires is None:
        return
    if is_run:
        raise ConfigError("--expires is not for the run of a workflow")
    if args.delay is not None and args.expires < args.delay:
        raise ConfigError("--expires is before the task is due, so it would never start")


def _decode_input(flow: Workflow[Any, Any], payload: msgspec.Raw) -> Any:
    try:
        return flow._decode_input(payload)
    except msgspec.DecodeError as error:
        raise EnqueueError(f"the input of workflow {flow.name} cannot be decoded: {error}") from error


def _read_stdin() -> str:
    try:
        return sys.stdin.read()
    except UnicodeDecodeError as error:
        raise EnqueueError(f"stdin is not text: {error}") from error


async def _insert_task(
    args: argparse.Namespace, database: Database, step: Any, flow: Workflow[Any, Any] | None, at: datetime | None
) -> tuple[TaskId, str | None]:
    """Insert the task; return its id, and a remark on its key if there is one."""
    if database.is_embedded:
        await migrate(database.dsn)
    client = Client(database.dsn, max_step_bytes=load_config().max_step_bytes)
    async with (
        open_connection(database.dsn, name="pgtask enqueue", pooled=database.is_pooled) as connection,
        connection.transaction(isolation="read_committed"),
    ):
        options: dict[str, Any] = {
            "queue": args.queue,
            "priority": args.priority,
            "key": args.key,
            "conn": connection,
        }
        after, expires = (None if one is None else timedelta(seconds=one) for one in (args.delay, args.expires))
        if flow is not None:
            run = await client.trigger(flow, _decode_input(flow, step.input), at=at, after=after, **options)
            assert isinstance(run.id, TaskId)
            task = run.id
        elif at is not None:
            task = await client.schedule(step, at, **options, **key_options(args), expires=expires)
        elif after is not None:
            task = await client.delay(step, after, **options, **key_options(args), expires=expires)
        else:
            task = await client.enqueue(step, **options, **key_options(args), expires=expires)
        return task, None if args.key is None else await _describe_key(connection, task, step, args.key)


async def _describe_key(connection: Any, task: TaskId, step: Any, key: str) -> str | None:
    """Return a remark if another task has the key."""
    if task.outcome != "kept":
        return describe_outcome(task, key)
    held = await find_step(connection, task)
    codec, payload = encode(step, sys.maxsize)
    ours = codec.prefix + payload + b"}}"
    if held is None:
        compared = "and has just finished"
    elif _decode_or_keep(held.encode()) == _decode_or_keep(ours):
        compared = "with the same payload"
    else:
        compared = "with another payload, which stays as it is"
    return f"nothing was enqueued: task {task} has the key {key!r} already, {compared}"


def _decode_or_keep(text: bytes) -> Any:
    try:
        return msgspec.json.decode(text)
    except msgspec.DecodeError:
        return text
