"""Tables for people: aligned columns, coloured and fitted to the width of a terminal, plain elsewhere.

Invariants: no cell brings a control character to the terminal, and no line of a table is longer than the terminal is
wide. Without a terminal nothing is cut, coloured or left out: programs always read the same text.
"""

from __future__ import annotations

import os
import textwrap
import unicodedata
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Generic, TextIO, TypeVar

import msgspec

__all__ = [
    "Column",
    "Screen",
    "detect_screen",
    "labelled_lines",
    "one_line",
    "printable",
    "shown_id",
    "table_lines",
    "truncate",
    "wrap_sentence",
]

Row = TypeVar("Row")

SHORT_ID = 8
"""Last digits of an id that a terminal shows: no two ids of one `enqueue_many` share them."""

_GAP = "  "
_MIN_TEXT_WIDTH = 20  # of the last column; in less room its text goes on a line of its own
_COMFORTABLE_NAME, _MIN_NAME = 20, 8  # widths to which names are cut before, and after, columns are left out
_LABEL_WIDTH = 11  # of the labels on a page
_BOLD, _RESET = "\x1b[1m", "\x1b[0m"


class Screen(msgspec.Struct, frozen=True):
    """The abilities of the output. `width` is None where it is not a terminal."""

    width: int | None = None
    has_colour: bool = False

    def paint(self, code: str, text: str) -> str:
        return f"{code}{text}{_RESET}" if self.has_colour and code and text else text


class Column(msgspec.Struct, Generic[Row], frozen=True):
    """A column: its title, and the function that returns the cell of a row.

    Where a terminal has too little room, a column whose cells are all `usual` is left out first, then those with a
    `rank`, the lowest first; names may be cut in the middle. An id is cut to its last digits on every terminal: each
    command takes them.
    """

    title: str
    cell: Callable[[Row], str]
    is_number: bool = False
    usual: str | None = None
    rank: int | None = None
    is_name: bool = False
    is_id: bool = False
    colours: Mapping[str, str] = {}


def detect_screen(stream: TextIO) -> Screen:
    if not stream.isatty():
        return Screen()
    try:
        width = os.get_terminal_size(stream.fileno()).columns
    except OSError:
        width = 0
    has_colour = os.environ.get("TERM", "dumb") != "dumb" and not os.environ.get("NO_COLOR")
    return Screen(width or 80, has_colour)


def table_lines(
    columns: Sequence[Column[Row]], rows: Sequence[Row], screen: Screen, *, text: Column[Row] | None = None
) -> Iterator[str]:
    """Yield the lines of a table. `text`, a last column that may be empty, is cut to the room that the others leave."""
    cells = [[_make_cell(column, row, screen) for column in columns] for row in rows]
    texts = ["" if text is None else printable(text.cell(row)) for row in rows]
    title = text.title if text is not None and any(texts) else ""
    widths = {
        at: max(map(_text_width, (column.title, *(row[at] for row in cells)))) for at, column in enumerate(columns)
    }
    if screen.width is not None:
        _fit_widths(widths, columns, cells, screen.width, len(_GAP) + _MIN_TEXT_WIDTH if title else 0)
    room = None if screen.width is None else screen.width - _line_width(widths) - len(_GAP)

    head = _GAP.join(_pad_cell(columns[at], columns[at].title, width) for at, width in widths.items())
    if title and (room is None or room >= _MIN_TEXT_WIDTH):
        head += _GAP + title
    yield screen.paint(_BOLD, head.rstrip())
    for row_cells, end in zip(cells, texts, strict=True):
        line = _GAP.join(_pad_cell(columns[at], row_cells[at], width, screen) for at, width in widths.items())
        if not end:
            yield line.rstrip()
        elif room is None or screen.width is None:
            yield line + _GAP + end
        elif room >= _MIN_TEXT_WIDTH:
            yield line + _GAP + truncate(end, room)
        else:
            yield line.rstrip()
            yield "    " + truncate(end, screen.width - 4)


def _make_cell(column: Column[Row], row: Row, screen: Screen) -> str:
    cell = printable(column.cell(row))
    return shown_id(cell, screen) if column.is_id else cell


def _fit_widths(
    widths: dict[int, int], columns: Sequence[Column[Row]], cells: Sequence[Sequence[str]], width: int, wanted: int
) -> None:
    """Remove from `widths`, by column, and shorten the rest, until a line fits `width`. The room `wanted` for a text at
    the end of the line removes usual columns only."""
    if _line_width(widths) + wanted > width:
        for at, column in enumerate(columns):
            if all(row[at] == column.usual for row in cells):
                del widths[at]
    full = dict(widths)
    _shorten_names(widths, columns, width, _COMFORTABLE_NAME)
    ranked = sorted((at for at in widths if columns[at].rank is not None), key=lambda at: columns[at].rank or 0)
    while _line_width(widths) > width and ranked:
        del widths[ranked.pop(0)]
    widths |= {at: full[at] for at in widths}  # the columns left out may have made room for names
    _shorten_names(widths, columns, width, _MIN_NAME)


def _shorten_names(widths: dict[int, int], columns: Sequence[Column[Row]], width: int, minimum: int) -> None:
    """Make the columns of names narrower, always the widest, until a line fits `width` or each is at the minimum."""
    names = [at for at in widths if columns[at].is_name]
    while _line_width(widths) > width and names:
        widest = max(names, key=widths.__getitem__)
        if widths[widest] > max(minimum, _text_width(columns[widest].title)):
            widths[widest] -= 1
        else:
            names.remove(widest)


def _line_width(widths: Mapping[int, int]) -> int:
    return sum(widths.values()) + len(_GAP) * (len(widths) - 1)


def _pad_cell(column: Column[Row], cell: str, width: int, screen: Screen | None = None) -> str:
    shown = _truncate_middle(cell, width)
    blanks = " " * (width - _text_width(shown))
    if screen is not None:
        shown = screen.paint(column.colours.get(cell, ""), shown)
    return blanks + shown if column.is_number else shown + blanks


# --- cells --------------------------------------------------------------------------------------------------


def printable(text: str) -> str:
    """Return the text with its control characters escaped, so that it can neither steer the terminal nor end the
    line."""
    return "".join(char if _is_printable(char) else char.encode("unicode_escape").decode() for char in text)


def _is_printable(char: str) -> bool:
    return unicodedata.category(char) not in ("Cc", "Cf", "Cs", "Zl", "Zp")


def shown_id(id: str, screen: Screen) -> str:
    """Return an id as a screen shows it: on a terminal by its last digits."""
    return id if screen.width is None else id[-SHORT_ID:]


def one_line(text: str) -> str:
    """Return the first line that is not blank."""
    return next((line.strip() for line in text.splitlines() if line.strip()), "")


def _text_width(text: str) -> int:
    if text.isascii():
        return len(text)
    return sum(map(_char_width, text))


def _char_width(char: str) -> int:
    if unicodedata.combining(char):
        return 0
    return 2 if unicodedata.east_asian_width(char) in "WF" else 1


def truncate(text: str, width: int) -> str:
    """Return a text that is no wider than so many columns of a terminal; an ellipsis stands for the rest."""
    if _text_width(text) <= width:
        return text
    taken = 0
    for at, char in enumerate(text):
        taken += _char_width(char)
        if taken > width - 1:
            return text[:at] + "…"
    return text


def _truncate_middle(text: str, width: int) -> str:
    """Keep the beginning and the end of a name, which tell it from others."""
    if _text_width(text) <= width:
        return text
    tail = text[::-1]
    end = truncate(tail, (width + 1) // 2).removesuffix("…")[::-1]
    return truncate(text, width - _text_width(end)) + end


def wrap_sentence(text: str, screen: Screen, indent: str = "") -> list[str]:
    """Return a sentence in lines that fit the terminal."""
    if screen.width is None:
        return [text]
    width = max(screen.width, _MIN_TEXT_WIDTH + len(indent))
    return textwrap.wrap(text, width, subsequent_indent=indent, break_on_hyphens=False) or [text]


def labelled_lines(label: str, value: str, screen: Screen) -> Iterator[str]:
    """Yield the line `label  value`, and further ones for the rest of a value that is too long for the terminal."""
    room = None if screen.width is None else max(screen.width - _LABEL_WIDTH - 1, _MIN_TEXT_WIDTH)
    for line in wrap_sentence(value, Screen(room)):
        yield f"{label:<{_LABEL_WIDTH}} {line}"
        label = ""
