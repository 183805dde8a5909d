"""The text that a failed step leaves in its row: the whole chain of the exception, and its place in user code.

Invariants: one line per exception, outermost first; no NUL, no lone surrogate, at most 8 KiB of UTF-8; never raises.
A place is a file that the user can fix, as long as the traceback has one.
"""

from __future__ import annotations

import os
import sysconfig
import traceback
from collections.abc import Iterator

from pgtask.errors import PgtaskError

__all__ = [
    "MAX_BYTES",
    "MAX_LINKS",
    "UNREADABLE",
    "describe",
    "is_ours",
    "one_line",
    "place_of",
    "sanitise",
    "summary",
]

MAX_BYTES = 8 * 1024
MAX_LINKS = 20  # exceptions of one chain
NO_REASON = "failed without a reason"
UNREADABLE = "(str() failed: {})"
"""The text of an exception whose own text cannot be read, with the name of the error of its `__str__`."""
_CUT = "\n[...]\n"
_MAX_SUMMARY, _MAX_LINE = 600, 300  # characters
_FOLLOWS = ("caused by ", "while handling ")

_OURS = os.path.dirname(os.path.abspath(__file__)) + os.sep
_COMPILED = (".pyx", ".pxi")
# The directories of Python and of installed packages. Compiled and generated code has no place that a person can open.
_OF_OTHERS = (
    "<",
    _OURS,
    *(sysconfig.get_path(name) + os.sep for name in ("stdlib", "platstdlib", "purelib", "platlib")),
)


def describe(error: BaseException | str) -> str:
    """Return the text for an exception, with its causes and its place, or for a reason given as text."""
    if isinstance(error, str):
        return sanitise(error if error.strip() else NO_REASON)
    return sanitise("\n".join(_describe_chain(error, set(), "")))


def summary(text: str) -> str:
    """Return the text of an error as one line for a log: the first line of each exception of the chain."""
    first, *rest = text.split("\n")
    lines = [first, *(line for line in rest if line.startswith(_FOLLOWS))]
    return "; ".join(line[:_MAX_LINE] for line in lines)[:_MAX_SUMMARY]


def sanitise(text: str) -> str:
    """Make `text` fit for Postgres: replace NUL and lone surrogates; keep head and tail of a text that is too long."""
    if len(text) > 2 * MAX_BYTES:
        text = text[:MAX_BYTES] + _CUT + text[-MAX_BYTES:]
    text = text.replace("\0", "\N{SYMBOL FOR NULL}")
    raw = text.encode("utf-8", "replace")
    if len(raw) <= MAX_BYTES:
        return raw.decode("utf-8")
    half = (MAX_BYTES - len(_CUT)) // 2
    return raw[:half].decode("utf-8", "ignore") + _CUT + raw[-half:].decode("utf-8", "ignore")


def _describe_chain(error: BaseException, seen: set[int], prefix: str) -> Iterator[str]:
    link: BaseException | None = error
    while link is not None and id(link) not in seen and len(seen) < MAX_LINKS:
        seen.add(id(link))
        if isinstance(link, PgtaskError) and type(link).__module__ == PgtaskError.__module__:
            # Its message suffices; its place in the engine helps no user.
            yield f"{prefix}{_message_of(link)}"
        else:
            message, newline, rest = _message_of(link).partition("\n")  # the place belongs on the first line
            yield f"{prefix}{_class_name(link)}{': ' if message else ''}{message}{place_of(link)}{newline}{rest}"
        if isinstance(link, BaseExceptionGroup):
            for member in link.exceptions:
                yield from _describe_chain(member, seen, "  | ")
        if link.__cause__ is not None:
            prefix, link = "caused by ", link.__cause__
        elif link.__context__ is not None and not link.__suppress_context__:
            prefix, link = "while handling ", link.__context__
        else:
            link = None


def _class_name(error: BaseException) -> str:
    cls = type(error)
    return cls.__qualname__ if cls.__module__ in ("builtins", "__main__") else f"{cls.__module__}.{cls.__qualname__}"


def _message_of(error: BaseException) -> str:
    try:
        return str(error)
    except BaseException as broken:  # a __str__ of user code that itself fails
        return UNREADABLE.format(type(broken).__name__)


# --- the place in user code


def is_ours(filename: str) -> bool:
    """Tell if a frame of that file belongs to pgtask itself."""
    return filename.startswith(_OURS) or ("_fastpath" in filename and filename.endswith(_COMPILED))


def one_line(error: BaseException) -> str:
    """Return an exception as one line: `KeyError: 'NAME' (at greetings.py:7 in <module>)`."""
    text = error.msg if isinstance(error, SyntaxError) else " ".join(str(error).split())
    return type(error).__name__ + (f": {text}" if text else "") + place_of(error)


def place_of(error: BaseException) -> str:
    """Return ` (at FILE:LINE in FUNCTION)`, to be appended to a message; empty if no frame is of user code."""
    if isinstance(error, SyntaxError) and error.filename is not None:
        return f" (at {error.filename}:{error.lineno})"
    frames = [(frame.f_code, line) for frame, line in traceback.walk_tb(error.__traceback__)]
    foreign = [
        (code, line)
        for code, line in frames
        if not code.co_filename.startswith(("<", _OURS)) and not code.co_filename.endswith(_COMPILED)
    ]
    own = [(code, line) for code, line in foreign if not code.co_filename.startswith(_OF_OTHERS)]
    if not foreign:
        return ""
    code, line = (own or foreign)[-1]
    return f" (at {code.co_filename}:{line} in {code.co_name})"
