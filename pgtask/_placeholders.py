"""The placeholders of a statement, for drivers that do not take `$1`.

Invariant: no value is ever put into the text, and no placeholder into a comment: comments are left out.
"""

from __future__ import annotations

import re
from functools import lru_cache
from typing import Literal

__all__ = ["Style", "translate"]

Style = Literal["numeric", "format", "pyformat"]

# A quoted text or name, a comment, a placeholder, or a percent sign.
_TOKEN = re.compile(r"""('[^']*'|"[^"]*")|(--[^\n]*)|\$(\d+)|%""")
_EMPTY_LINES = re.compile(r"\n\s*\n")


@lru_cache(maxsize=256)
def translate(query: str, style: Style) -> tuple[str, list[int]]:
    """Return the statement with the placeholders of a style: `$1` (numeric), `%s` (format) or `%(p1)s` (pyformat); and
    the number, from 1, of the value of each placeholder in its place."""
    numbers: list[int] = []

    def translated(match: re.Match[str]) -> str:
        quoted, comment, number = match[1], match[2], match[3]
        if comment is not None:
            return ""
        if number is not None:
            numbers.append(int(number))
            return {"numeric": f"${number}", "format": "%s", "pyformat": f"%(p{number})s"}[style]
        text = quoted or "%"
        return text if style == "numeric" else text.replace("%", "%%")

    text = _TOKEN.sub(translated, query)
    return _EMPTY_LINES.sub("\n", text).strip(), numbers
