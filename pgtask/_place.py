"""An exception of the user's code as one line of text, with the innermost place of that code.

Invariant: never names a file that the user could not mend, as long as there is another.
"""

from __future__ import annotations

import os
import sysconfig
import traceback

__all__ = ["one_line", "place_of"]

_OURS = os.path.dirname(os.path.abspath(__file__)) + os.sep
# Where Python and installed packages live; compiled and generated code has no place that a person could open.
_OF_OTHERS = (
    "<",
    _OURS,
    *(sysconfig.get_path(name) + os.sep for name in ("stdlib", "platstdlib", "purelib", "platlib")),
)


def one_line(error: BaseException) -> str:
    """`KeyError: 'NAME' (at greetings.py:7 in <module>)`"""
    text = error.msg if isinstance(error, SyntaxError) else " ".join(str(error).split())
    return type(error).__name__ + (f": {text}" if text else "") + place_of(error)


def place_of(error: BaseException) -> str:
    """` (at FILE:LINE in FUNCTION)`, to be put behind a message; empty if the user's code had no part in it."""
    if isinstance(error, SyntaxError) and error.filename is not None:
        return f" (at {error.filename}:{error.lineno})"
    frames = [(frame.f_code, line) for frame, line in traceback.walk_tb(error.__traceback__)]
    foreign = [
        (code, line)
        for code, line in frames
        if not code.co_filename.startswith(("<", _OURS)) and not code.co_filename.endswith((".pyx", ".pxi"))
    ]
    own = [(code, line) for code, line in foreign if not code.co_filename.startswith(_OF_OTHERS)]
    if not foreign:
        return ""
    code, line = (own or foreign)[-1]
    return f" (at {code.co_filename}:{line} in {code.co_name})"
