"""The text that a failed step leaves in its row: the whole chain of the exception, safe to store and to read.

Invariants: one line per exception, outermost first; no NUL, no lone surrogate, at most 8 KiB of UTF-8; never raises.
"""

from __future__ import annotations

from collections.abc import Iterator

from pgtask._place import place_of
from pgtask.errors import PgtaskError

__all__ = ["MOST_BYTES", "describe", "sanitise"]

MOST_BYTES = 8 * 1024
_MOST_LINKS = 20
NO_REASON = "failed without a reason"
_CUT = "\n[...]\n"


def describe(error: BaseException | str) -> str:
    """The text for an exception (its chain of causes, where it was raised) or for a reason given as text."""
    if isinstance(error, str):
        return sanitise(error if error.strip() else NO_REASON)
    return sanitise("\n".join(_lines(error, set(), "")))


def _lines(error: BaseException, seen: set[int], prefix: str) -> Iterator[str]:
    link: BaseException | None = error
    while link is not None and id(link) not in seen and len(seen) < _MOST_LINKS:
        seen.add(id(link))
        if (
            isinstance(link, PgtaskError) and type(link).__module__ == PgtaskError.__module__
        ):  # says all there is to say; where in the engine it was raised is no matter
            yield f"{prefix}{_message(link)}"
        else:
            message = _message(link)
            yield f"{prefix}{_name(link)}{': ' if message else ''}{message}{place_of(link)}"
        if isinstance(link, BaseExceptionGroup):
            for member in link.exceptions:
                yield from _lines(member, seen, "  | ")
        if link.__cause__ is not None:
            prefix, link = "caused by ", link.__cause__
        elif link.__context__ is not None and not link.__suppress_context__:
            prefix, link = "while handling ", link.__context__
        else:
            link = None


def _name(error: BaseException) -> str:
    cls = type(error)
    return cls.__qualname__ if cls.__module__ in ("builtins", "__main__") else f"{cls.__module__}.{cls.__qualname__}"


def _message(error: BaseException) -> str:
    try:
        return str(error)
    except BaseException as broken:  # a __str__ of the user's that itself fails
        return f"(its text cannot be had: {type(broken).__name__})"


def sanitise(text: str) -> str:
    """What Postgres can store in `text`: NUL and lone surrogates replaced; head and tail kept when it is too long."""
    if len(text) > 2 * MOST_BYTES:
        text = text[:MOST_BYTES] + _CUT + text[-MOST_BYTES:]
    text = text.replace("\0", "\N{SYMBOL FOR NULL}")
    raw = text.encode("utf-8", "replace")
    if len(raw) <= MOST_BYTES:
        return raw.decode("utf-8")
    half = (MOST_BYTES - len(_CUT)) // 2
    return raw[:half].decode("utf-8", "ignore") + _CUT + raw[-half:].decode("utf-8", "ignore")
