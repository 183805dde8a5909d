"""The terminal of `pgtask top`. curses sends it what has changed, and nothing else.

Invariants: the terminal is as it was when the block ends, however it ends; without colours nothing is lost.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from pgtask._cli.top_lines import Line
from pgtask.errors import ConfigError

__all__ = ["TopTerminal", "open_terminal"]

_REMEDY = "for one look without a terminal: pgtask top --once"


@contextlib.contextmanager
def open_terminal() -> Iterator[TopTerminal]:
    """Take over the terminal for the block. Raises `ConfigError` where that is impossible."""
    if not (sys.stdin.isatty() and sys.stdout.isatty()):
        raise ConfigError(f"pgtask top needs a terminal; {_REMEDY}, or for programs: --json")
    try:
        import curses
    except ImportError:
        raise ConfigError(f"pgtask top needs the module curses, which this Python lacks; {_REMEDY}") from None
    os.environ.setdefault("ESCDELAY", "50")  # milliseconds; by default a lone Esc waits for a second
    try:
        window = curses.initscr()
    except curses.error as error:
        term = os.environ.get("TERM", "")
        raise ConfigError(f"pgtask top cannot use a terminal of the type TERM={term!r}: {error}; {_REMEDY}") from None
    try:
        curses.noecho()
        curses.cbreak()
        window.nodelay(True)
        window.keypad(True)
        with contextlib.suppress(curses.error):
            curses.curs_set(0)
        yield TopTerminal(curses, window)
    finally:
        with contextlib.suppress(curses.error):
            curses.curs_set(1)
        curses.endwin()


class TopTerminal:
    """The terminal while it is ours."""

    def __init__(self, curses: Any, window: Any) -> None:
        self._curses = curses
        self._window = window
        self._styles = {
            "bar": curses.A_REVERSE,
            "head": curses.A_BOLD,
            "bad": curses.A_BOLD,
            "dim": curses.A_DIM,
            "": curses.A_NORMAL,
        }
        if curses.has_colors() and not os.environ.get("NO_COLOR"):
            curses.start_color()
            with contextlib.suppress(curses.error):
                curses.use_default_colors()
                curses.init_pair(1, curses.COLOR_RED, -1)
                self._styles["bad"] = curses.color_pair(1)

    @property
    def size(self) -> tuple[int, int]:
        """The columns and lines."""
        lines, columns = self._window.getmaxyx()
        return columns, lines

    def draw(self, lines: Sequence[Line]) -> None:
        columns, _ = self.size
        self._window.erase()
        for at, line in enumerate(lines):
            style = self._styles[line.style]
            text = line.text.ljust(columns) if line.style == "bar" else line.text
            with contextlib.suppress(self._curses.error):  # the last cell moves the cursor out of the screen
                self._window.addnstr(at, 0, text, columns, style)
        self._window.refresh()

    def listen(self, press: Callable[[str], None], resized: Callable[[], None]) -> None:
        """Call back for each key, and after each change of the size, from the running loop."""
        loop = asyncio.get_running_loop()
        loop.add_reader(sys.stdin.fileno(), self._read_keys, press)
        loop.add_signal_handler(signal.SIGWINCH, self._resize, resized)

    def _read_keys(self, press: Callable[[str], None]) -> None:
        while True:
            try:
                key = self._window.get_wch()
            except self._curses.error:
                return
            if isinstance(key, str):
                press(key)
            elif key == self._curses.KEY_BACKSPACE:
                press("\x7f")
            elif key == self._curses.KEY_ENTER:
                press("\n")

    def _resize(self, resized: Callable[[], None]) -> None:
        columns, lines = os.get_terminal_size(sys.stdout.fileno())
        self._curses.resizeterm(lines, columns)
        self._window.clear()
        resized()
