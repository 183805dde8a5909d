"""What an address or a form asks for: filters, a cursor, an id. A text that cannot be read is answered with 400.

Invariant: no text of a request reaches a statement that Postgres would refuse for it.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from datetime import timedelta
from typing import get_args
from urllib.parse import parse_qsl, urlencode
from uuid import UUID

from pgtask._durations import DURATION_EXAMPLES, MAX_SECONDS, parse_duration
from pgtask._placement import scoped_key
from pgtask._postgres.listing import STATES, Cursor, TaskFilter, check_error_pattern
from pgtask.errors import EnqueueError
from pgtask.policy import check_queue
from pgtask.workflow import RunState

__all__ = [
    "FILTERS",
    "BadQuestion",
    "parse_cursor",
    "parse_fields",
    "parse_filter",
    "parse_id",
    "parse_run_state",
    "with_query",
]

FILTERS = ("state", "queue", "task", "step", "error", "age", "key")
_MAX_TEXT = 500
_MAX_PATTERN = 10_000  # a cause may have the first line of a long error
_BROKEN = re.compile(rb"%(?![0-9a-fA-F]{2})")


class BadQuestion(Exception):
    """A part of the address cannot be read; the text says what was expected."""


def parse_fields(encoded: bytes, known: Collection[str]) -> dict[str, str]:
    """Return the fields of an address or a form, each of them known and given once, without blanks at their ends."""
    if _BROKEN.search(encoded):
        raise BadQuestion("a % stands before two hexadecimal digits: write %25 for the sign itself")
    try:
        pairs = parse_qsl(encoded.decode(), keep_blank_values=True, errors="strict")
    except UnicodeDecodeError:
        raise BadQuestion("the fields are not UTF-8: encode them so") from None
    fields: dict[str, str] = {}
    for name, text in pairs:
        if name not in known:
            raise BadQuestion(f"there is no field {name[:_MAX_TEXT]!r}: there are {', '.join(known)}")
        if name in fields:
            raise BadQuestion(f"{name}: give it once")
        most = _MAX_PATTERN if name == "error" else _MAX_TEXT
        if len(text) > most:
            raise BadQuestion(f"{name}: give up to {most:,} characters")
        if "\0" in text:
            raise BadQuestion(f"{name}: leave out the character NUL (%00), which no text of Postgres has")
        fields[name] = text.strip()
    return fields


def parse_filter(query: Mapping[str, str]) -> TaskFilter:
    """Return the filter that the fields of the form name, as `pgtask list` has them."""
    texts = {name: query.get(name, "") for name in FILTERS}
    task, step = texts["task"], texts["step"]
    if "." in step:
        named, _, step = step.partition(".")
        if task not in ("", named):
            raise BadQuestion(f"task {task} has no step {texts['step']}")
        task = named
    return TaskFilter(
        states=_parse_states(texts["state"], texts["error"]),
        queues=_parse_queues(texts["queue"]),
        task=task or None,
        step=step or None,
        error=_parse_pattern(texts["error"]),
        older_than=_parse_age(texts["age"]),
        key=_parse_key(texts["key"], task),
    )


def _parse_states(text: str, error: str) -> tuple[str, ...]:
    if text and text not in STATES:
        raise BadQuestion(f"state {text}: there are {', '.join(STATES)}")
    if error and text not in ("", "parked"):
        raise BadQuestion("an error is of parked tasks: leave out the state")
    return ("parked",) if error else (text,) if text else STATES


def _parse_queues(text: str) -> tuple[str, ...] | None:
    try:
        return tuple(dict.fromkeys(check_queue(name.strip()) for name in text.split(","))) if text else None
    except ValueError as error:
        raise BadQuestion(str(error)) from None


def _parse_pattern(text: str) -> str | None:
    try:
        return check_error_pattern(text) if text else None
    except ValueError as error:
        raise BadQuestion(f"error {text}: {error}") from None


def _parse_age(text: str) -> timedelta | None:
    if not text:
        return None
    try:
        seconds = parse_duration(text)
    except ValueError:
        raise BadQuestion(f"age {text}: give seconds, or a time span such as {DURATION_EXAMPLES}") from None
    if seconds >= MAX_SECONDS:
        raise BadQuestion(f"age {text} is too long: give less than {MAX_SECONDS:,} seconds")
    return timedelta(seconds=seconds)


def _parse_key(key: str, task: str) -> str | None:
    if not key:
        return None
    if not task:
        raise BadQuestion("a key belongs to a task or workflow: name that too")
    try:
        scoped_key(task, key)
    except EnqueueError as error:
        raise BadQuestion(str(error)) from None
    return key


def parse_cursor(text: str | None) -> Cursor | None:
    try:
        return Cursor.parse(text) if text else None
    except ValueError:
        raise BadQuestion(f"{text} is no place in a list: begin at its first page") from None


def parse_id(text: str) -> UUID:
    try:
        return UUID(text)
    except ValueError:
        raise BadQuestion(f"{text} is not an id: give its 32 digits") from None


def parse_run_state(text: str) -> RunState | None:
    known: dict[str, RunState] = {state: state for state in get_args(RunState)}
    if text and text not in known:
        raise BadQuestion(f"state {text}: there are {', '.join(known)}")
    return known.get(text)


def with_query(path: str, **fields: object) -> str:
    """Return an address with those of the fields that are not empty."""
    given = {name: str(value) for name, value in fields.items() if value not in (None, "")}
    return f"{path}?{urlencode(given)}" if given else path
