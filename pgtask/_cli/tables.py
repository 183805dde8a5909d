"""Tables, times and sizes for people: aligned columns, coloured and cut to the width of a terminal, plain elsewhere.

Invariants: no cell brings a control character to the terminal; without a terminal nothing is cut, coloured or left out,
so that what a program reads does not depend on who looks.
"""

from __future__ import annotations

import os
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime
from typing import TextIO

import msgspec

__all__ = ["Column", "Screen", "moment", "one_line", "printable", "relative", "screen_of", "size", "table_lines"]

_GAP = "  "
_LEAST_ROOM = 20  # for the text in the last column; with less it goes on a line of its own
_BOLD, _RESET = "\x1b[1m", "\x1b[0m"


class Screen(msgspec.Struct, frozen=True):
    """What the output can show. `width` is None where it is not a terminal."""

    width: int | None = None
    has_colour: bool = False

    def paint(self, code: str, text: str) -> str:
        return f"{code}{text}{_RESET}" if self.has_colour and code and text else text


class Column(msgspec.Struct, frozen=True):
    """A column; one whose cells are all `usual` is left out on a terminal that has no room for it."""

    title: str
    is_number: bool = False
    usual: str | None = None
    colours: Mapping[str, str] = {}


def screen_of(stream: TextIO) -> Screen:
    if not stream.isatty():
        return Screen()
    try:
        width = os.get_terminal_size(stream.fileno()).columns
    except OSError:
        width = 0
    has_colour = os.environ.get("TERM", "dumb") != "dumb" and not os.environ.get("NO_COLOR")
    return Screen(width or 80, has_colour)


def table_lines(
    columns: Sequence[Column],
    rows: Sequence[Sequence[str]],
    screen: Screen,
    *,
    texts: tuple[str, Sequence[str]] | None = None,
) -> Iterator[str]:
    """The lines of a table. `texts`, a title and one text for each row, take what room is left, and are cut to it."""
    cells = [[printable(cell) for cell in row] for row in rows]
    widths = [max(map(_width, (column.title, *(row[at] for row in cells)))) for at, column in enumerate(columns)]
    shown = list(range(len(columns)))
    title, notes = texts if texts is not None and any(texts[1]) else ("", [""] * len(cells))
    if screen.width is not None and _room(screen.width, widths, shown) < (_LEAST_ROOM if title else 0):
        shown = [at for at in shown if any(row[at] != columns[at].usual for row in cells)]
    room = None if screen.width is None else _room(screen.width, widths, shown)

    head = _GAP.join(_padded(columns[at], columns[at].title, widths[at]) for at in shown)
    if title and (room is None or room >= _LEAST_ROOM):
        head += _GAP + title
    yield screen.paint(_BOLD, head.rstrip())
    for row, note in zip(cells, notes, strict=True):
        line = _GAP.join(_padded(columns[at], row[at], widths[at], screen) for at in shown)
        if not note:
            yield line.rstrip()
        elif room is None or screen.width is None:
            yield line + _GAP + printable(note)
        elif room >= _LEAST_ROOM:
            yield line + _GAP + _cut(printable(note), room)
        else:
            yield line.rstrip()
            yield "    " + _cut(printable(note), screen.width - 4)


def _room(width: int, widths: Sequence[int], shown: Sequence[int]) -> int:
    """What a line of `width` has left after the shown columns."""
    return width - sum(widths[at] + len(_GAP) for at in shown)


def _padded(column: Column, cell: str, width: int, screen: Screen | None = None) -> str:
    blanks = " " * (width - _width(cell))
    if screen is not None:
        cell = screen.paint(column.colours.get(cell, ""), cell)
    return blanks + cell if column.is_number else cell + blanks


# --- cells --------------------------------------------------------------------------------------------------


def printable(text: str) -> str:
    """The text with its control characters escaped, so that it cannot steer the terminal or end the line."""
    return "".join(char if _is_printable(char) else char.encode("unicode_escape").decode() for char in text)


def _is_printable(char: str) -> bool:
    return unicodedata.category(char) not in ("Cc", "Cf", "Cs", "Zl", "Zp")


def one_line(text: str) -> str:
    """The first line that is not blank."""
    return next((line.strip() for line in text.splitlines() if line.strip()), "")


def _width(text: str) -> int:
    if text.isascii():
        return len(text)
    return sum(map(_char_width, text))


def _char_width(char: str) -> int:
    if unicodedata.combining(char):
        return 0
    return 2 if unicodedata.east_asian_width(char) in "WF" else 1


def _cut(text: str, width: int) -> str:
    if _width(text) <= width:
        return text
    taken = 0
    for at, char in enumerate(text):
        taken += _char_width(char)
        if taken > width - 1:
            return text[:at] + "…"
    return text


def relative(time: datetime, now: datetime) -> str:
    """`in 5m`, `3s ago`, `now`, `never`: in the largest unit of which there are at least two."""
    if time.year == 9999:
        return "never"
    seconds = (time - now).total_seconds()
    number, unit = abs(seconds), "s"
    for size, name in ((60, "m"), (3600, "h"), (86400, "d")):
        if abs(seconds) >= 2 * size:
            number, unit = abs(seconds) / size, name
    if number < 1:
        return "now"
    return f"in {number:.0f}{unit}" if seconds > 0 else f"{number:.0f}{unit} ago"


def moment(time: datetime, now: datetime) -> str:
    """A time in UTC, and how far it is from `now`."""
    return f"{time:%Y-%m-%d %H:%M:%S} UTC ({relative(time, now)})"


def size(octets: int) -> str:
    """`512 bytes`, `8.0 kB`, `1.2 GB`."""
    number, unit = float(octets), "bytes"
    for name in ("kB", "MB", "GB", "TB"):
        if number < 1000:
            break
        number, unit = number / 1024, name
    return f"{number:.0f} {unit}" if unit == "bytes" or number >= 100 else f"{number:.1f} {unit}"
