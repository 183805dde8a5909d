"""The remedies for what would break, one sentence each."""

from __future__ import annotations

import re
from collections.abc import Iterable

import msgspec

from pgtask._nearest import nearest
from pgtask.task import Task

__all__ = [
    "BAD_ENVELOPE",
    "CODE_RAISES",
    "OTHER_CAUSES",
    "REPLAY",
    "SLOW",
    "TOO_LARGE",
    "for_input",
    "for_payload",
    "for_result",
    "for_unknown_step",
    "for_unknown_task",
    "for_use",
    "for_version",
]

REPLAY = (
    "raise the version of the workflow, and keep the old function for the runs that began under it; if its code has "
    "not changed, it depends on what differs in each replay (docs/code-changes.md)"
)
CODE_RAISES = "let the code between the calls of ctx accept what the run has recorded, or raise the version"
TOO_LARGE = "raise --max-step-bytes of the workers and of the check"
BAD_ENVELOPE = "cancel the task, or repair its column step by SQL"
SLOW = "a replay repeats the code between the calls of ctx: move what takes long into a step"
OTHER_CAUSES = "remove the causes above first, then check again"

_LIKE = 0.6  # of 1, from which on a name may be the new one of another
_MISSING = re.compile(r"missing required field `(.+?)`(?! - at)")
_NESTED = re.compile(r" - at `\$(?!`)")


def for_unknown_task(task: str, known: Iterable[str]) -> str:
    meant = nearest(task, known, cutoff=_LIKE)
    renamed = f"was it renamed to {meant}? " if meant else ""
    return f"{renamed}keep {task} in the app until none of it waits; if another app has it, name that app too"


def for_unknown_step(step: str, known: Iterable[str]) -> str:
    meant = nearest(step, known, cutoff=_LIKE)
    if meant:
        return f"was it renamed to {meant}? keep {step} too, with a run() that returns Next({meant}(...))"
    return f"keep {step} in the app until no task waits at it"


def for_payload(cls: type[Task] | None, payload: bytes, error: str) -> str:
    """Return the remedy for a step that cannot be decoded: by msgspec's message, and the fields that the row has. There
    is no class if the envelope itself is broken."""
    if cls is None or "valid JSON" in error or "malformed" in error:
        return BAD_ENVELOPE
    if (missing := _MISSING.search(error)) is not None and _NESTED.search(error) is None:
        if (old := _left_over_field(cls, payload)) is not None:
            rename = f'class {cls.__name__}(..., rename={{"{missing[1]}": "{old}"}})'
            return f"if {missing[1]} is the new name of {old}: {rename}; else give it a default"
        return f"give {missing[1]} a default"
    return _for_value(error)


def for_input(error: str) -> str:
    return f"{_for_value(error)}, or raise the version of the workflow and keep the old function"


def for_result(error: str) -> str:
    return f"{_for_value(error)}, or raise the version of the workflow and keep the old function"


def _for_value(error: str) -> str:
    if "missing required field" in error:
        return "give the field a default"
    if "unknown field" in error:
        return "keep the field, or leave out forbid_unknown_fields"
    if "Expected" in error:
        return "let the annotation accept the old type too, as in int | str, until none waits"
    return "let the annotation accept the old values too, until none waits"


def for_version(versions: Iterable[str]) -> str:
    return f"keep the function for it until none of its runs waits; the app has {', '.join(versions)}"


def for_use(what: str) -> str:
    return f"a check has no {what}: use it in a step, and decide by what the step returns"


def _left_over_field(cls: type[Task], payload: bytes) -> str | None:
    """Return the one field of a payload that the class does not have."""
    try:
        fields = msgspec.json.decode(payload)
    except msgspec.DecodeError:
        return None
    left = set(fields) - set(cls.__struct_encode_fields__) if isinstance(fields, dict) else set()
    return left.pop() if len(left) == 1 else None
