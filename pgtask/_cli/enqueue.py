"""`pgtask enqueue`: from the words of a command line to a step that the app would run.

Invariant: what a worker could not decode, or would decode into something else than was typed, is refused here.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
from datetime import datetime, timedelta
from typing import Any
from uuid import UUID

import msgspec

from pgtask._cli.database import Database, find_database, load_configured_app
from pgtask._cli.output import OutputError, say, show
from pgtask._fastpath import Codec
from pgtask._postgres.migrate import migrate
from pgtask.app import App, StepDefinition
from pgtask.client import Client
from pgtask.config import load_config
from pgtask.errors import ConfigError, DecodeError, EnqueueError
from pgtask.task import Task
from pgtask.workflow import STEP, Workflow

__all__ = ["enqueue_command"]


def split_words(words: list[str]) -> tuple[str | None, str, str | None]:
    """APP, STEP and JSON of `[APP] STEP [JSON]`; an app has a colon in it, and a step has none."""
    app = words.pop(0) if len(words) == 3 or ":" in words[0] else None
    if len(words) not in (1, 2):
        raise ConfigError("give [APP] STEP [JSON] (see pgtask enqueue --help)")
    return app, words[0], words[1] if len(words) == 2 else None


def find_step(app: App, name: str) -> StepDefinition:
    """The step called `ReadName` or `Greeter.ReadName`. Raises `EnqueueError` that lists what there is."""
    if name in app.workflows:
        name = f"{name}.{STEP}"
    found = [definition for definition in app if name in (definition.name, definition.label)]
    if len(found) == 1:
        return found[0]
    if found:
        labels = ", ".join(definition.label for definition in found)
        raise EnqueueError(f"step {name} is ambiguous: give one of {labels}")
    labels = ", ".join(definition.label for definition in app)
    raise EnqueueError(f"there is no step {name} in this app; it has {labels}")


def read_step(definition: StepDefinition, text: str | None) -> Task:
    """The step whose fields are the JSON `text`; without one, all its defaults. Raises `EnqueueError`."""
    codec = Codec(definition.cls, definition.task, definition.name, definition.transparent)
    if text is None:
        text = "{}" if definition.fields and not definition.transparent else "null"
    data = text.encode("utf-8", "surrogateescape")
    try:
        msgspec.json.decode(data)
    except msgspec.DecodeError as error:
        raise EnqueueError(f"{text!r:.80} is not JSON ({error}); {_example(definition)}") from None
    try:
        step = codec.decode(data)
    except DecodeError as error:
        raise EnqueueError(f"step {error}") from error
    if not definition.transparent:
        _refuse_unknown_fields(definition, text)
    return step


def _example(definition: StepDefinition) -> str:
    if not definition.fields:
        return f"step {definition.label} has no fields: leave it out"
    first = msgspec.structs.fields(definition.cls)[0]
    sample = 1 if first.type in (int, float) else "text"
    value = sample if definition.transparent else {first.encode_name: sample}
    return f"for example '{json.dumps(value)}'"


def _refuse_unknown_fields(definition: StepDefinition, text: str) -> None:
    """Decoding passes over them, so that old workers bear new fields; from a person they are typing errors."""
    given = msgspec.json.decode(text)
    if not isinstance(given, dict):
        return
    known = (*definition.cls.__struct_encode_fields__, definition.cls.__struct_config__.tag_field)
    for name in given:
        if name not in known:
            fields = ", ".join(definition.cls.__struct_encode_fields__) or "none"
            raise EnqueueError(f"step {definition.label} has no field {name!r}; its fields: {fields}")


def due_time(text: str) -> datetime:
    """An ISO time with its zone. Raises `EnqueueError`."""
    try:
        time = datetime.fromisoformat(text)
    except ValueError:
        raise EnqueueError(f"--at {text}: expected a time such as 2026-12-24T18:00:00+01:00") from None
    if time.tzinfo is None:
        raise EnqueueError(f"--at {text}: has no time zone; add Z or an offset such as +01:00")
    return time


def enqueue_command(args: argparse.Namespace) -> int:
    app, name, text = split_words(args.words)
    loaded = load_configured_app(app)
    definition = find_step(loaded, name)
    step = read_step(definition, _read_stdin() if text == "-" else text)
    flow = loaded.workflows[definition.task][-1] if definition.task in loaded.workflows else None
    at = None if args.at is None else due_time(args.at)
    task = asyncio.run(_insert(args, find_database(vars(args)), step, flow, at))
    try:
        show([str(task)])
    except OutputError as error:  # a script that does not hear of it must not enqueue it twice
        say(f"task {task} is enqueued, but {error}")
        return error.code
    return 0


def _read_input(flow: Workflow[Any, Any], payload: msgspec.Raw) -> Any:
    try:
        return flow.decode_input(payload)
    except msgspec.DecodeError as error:
        raise EnqueueError(f"the input of workflow {flow.name} cannot be decoded: {error}") from error


def _read_stdin() -> str:
    try:
        return sys.stdin.read()
    except UnicodeDecodeError as error:
        raise EnqueueError(f"stdin is not text: {error}") from error


async def _insert(
    args: argparse.Namespace, database: Database, step: Any, flow: Workflow[Any, Any] | None, at: datetime | None
) -> UUID:
    if database.is_embedded:
        await migrate(database.dsn)
    options: dict[str, Any] = {"queue": args.queue, "priority": args.priority, "key": args.key}
    async with Client(database.dsn, pool_size=1, max_step_bytes=load_config().max_step_bytes) as client:
        if flow is not None:
            after = None if args.delay is None else timedelta(seconds=args.delay)
            return (await client.trigger(flow, _read_input(flow, step.input), at=at, after=after, **options)).id
        if at is not None:
            return await client.schedule(step, at, **options)
        if args.delay is not None:
            return await client.delay(step, timedelta(seconds=args.delay), **options)
        return await client.enqueue(step, **options)
