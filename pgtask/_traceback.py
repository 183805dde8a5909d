"""The traceback of an error in user code, as a log shows it: with the frames of that code, without the engine's.

Invariants: bounded for every exception; never raises. An error of the engine alone keeps its frames: without them the
bug could not be located.
"""

from __future__ import annotations

import os
import sysconfig
import traceback
from collections.abc import Iterator

from pgtask._error_text import MAX_LINKS, UNREADABLE, is_ours
from pgtask.errors import PgtaskError

__all__ = ["traceback_of"]

MAX_TEXT = 32 * 1024  # characters
_MAX_FRAMES = 100
_CUT = "\n[...]\n"
_CAUSE = "The above exception was the direct cause of the following exception:"
_CONTEXT = "During handling of the above exception, another exception occurred:"
# The callers of user code: their frames are left out in front of it.
_PLUMBING = tuple(os.path.join(sysconfig.get_path("stdlib"), name) + os.sep for name in ("asyncio", "concurrent"))


def traceback_of(error: BaseException) -> str:
    """Return the text, innermost cause first as Python has it; empty if no frame is left to show."""
    seen: set[int] = set()
    blocks = list(_format_chain(error, seen))
    if not any("  File " in block for block in blocks):
        return ""
    text = "\n".join(blocks).rstrip("\n")
    if len(text) > MAX_TEXT:
        text = text[: MAX_TEXT // 2] + _CUT + text[-MAX_TEXT // 2 :]
    return text


def _format_chain(error: BaseException, seen: set[int]) -> Iterator[str]:
    """Yield the chain that leads to an error, with the words that join each exception to the next."""
    chain: list[tuple[BaseException, str]] = []
    link: BaseException | None = error
    words = ""
    while link is not None and id(link) not in seen and len(seen) < MAX_LINKS:
        seen.add(id(link))
        chain.append((link, words))
        if link.__cause__ is not None:
            words, link = _CAUSE, link.__cause__
        else:
            words, link = _CONTEXT, None if link.__suppress_context__ else link.__context__
    for link, words in reversed(chain):
        yield _format_one(link)
        if isinstance(link, BaseExceptionGroup):
            for member in link.exceptions:
                if len(seen) < MAX_LINKS:
                    yield from (
                        "\n".join(f"  | {line}" for line in block.split("\n")) for block in _format_chain(member, seen)
                    )
        if words:
            yield f"\n{words}\n"


def _format_one(error: BaseException) -> str:
    """Return one exception as Python prints it: its frames and its last line."""
    try:
        last = "".join(traceback.format_exception_only(error))
    except BaseException as broken:  # a __str__ of user code that itself fails
        last = f"{type(error).__name__} {UNREADABLE.format(type(broken).__name__)}\n"
    frames = _relevant_frames(error)
    head = "Traceback (most recent call last):\n" if frames else ""
    return (head + "".join(traceback.format_list(frames)) + last).rstrip("\n")


def _relevant_frames(error: BaseException) -> traceback.StackSummary:
    found = traceback.extract_tb(error.__traceback__, limit=-_MAX_FRAMES)
    shown = [frame for frame in found if not is_ours(frame.filename)]
    while shown and shown[0].filename.startswith(_PLUMBING):
        shown.pop(0)
    if not shown and not isinstance(error, PgtaskError):
        return found
    return traceback.StackSummary.from_list(shown)
