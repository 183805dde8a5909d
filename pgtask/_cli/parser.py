"""The argument parser of both programs: its errors, with hints for unknown words, and the layout of its help."""

from __future__ import annotations

import argparse
import re
import shutil
import textwrap
from collections.abc import Callable, Container, Mapping, Sequence
from typing import Any, ClassVar, NoReturn, TypeVar

from pgtask._dsn import concealed_words
from pgtask._nearest import did_you_mean
from pgtask.errors import ConfigError

__all__ = ["Parser", "help_formatter", "parse_words"]

T = TypeVar("T")

_MAX_WIDTH = 110


class Parser(argparse.ArgumentParser):
    """A parser that raises a `ConfigError` of one line. `synonyms` maps the flags of other programs to ours."""

    synonyms: ClassVar[Mapping[str, str]] = {}

    def __init__(self, **options: Any) -> None:
        super().__init__(allow_abbrev=False, **{"formatter_class": help_formatter(), **options})

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message} (see {self.prog} --help)")

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Refuse unknown words in the parser of the command, so that the error names the help of the command."""
        namespace, unknown = super().parse_known_args(args, namespace)
        if unknown:
            hints = (self._hint_for(word) for word in unknown)
            self.error(f"unrecognized arguments: {' '.join(unknown)}{next(filter(None, hints), '')}")
        return namespace, unknown

    def _hint_for(self, word: str) -> str:
        flag = word.partition("=")[0]
        if not flag.startswith("-"):
            return ""
        known = self._option_string_actions
        states = known["--state"].choices if "--state" in known else None
        if states and flag[2:] in states:
            return f"; did you mean --state {flag[2:]}?"
        meant = self.synonyms.get(flag)
        if meant is not None and meant.split()[0] in known:
            return f"; did you mean {meant}?"
        return did_you_mean(flag, [name for name in known if name.startswith("--")]) if len(flag) > 3 else ""


def parse_words(parse: Callable[[list[str]], T], words: Sequence[str], known: Container[str] = ()) -> T:
    """Call `parse` with the words. Its `ConfigError` quotes no word that may hold a password, unless the word is
    `known`: where one may, the error comes from parsing again with the passwords hidden, so that our own text stays."""
    shown = concealed_words(words, known)
    try:
        return parse(list(words))
    except ConfigError:
        if shown == list(words):
            raise
    parse(shown)
    raise ConfigError("an argument cannot be read, and is not shown since it may hold a password")


def help_formatter(position: int = 26) -> Any:
    """Return a formatter as wide as the terminal. The help of the arguments begins at column `position`."""

    def make(prog: str) -> argparse.HelpFormatter:
        width = min(shutil.get_terminal_size((_MAX_WIDTH + 2, 24)).columns - 2, _MAX_WIDTH)
        return _HelpFormatter(prog, max_help_position=position, width=width)

    return make


class _HelpFormatter(argparse.HelpFormatter):
    """A formatter that fills paragraphs, except those with an indented line, which are tables or examples."""

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        paragraphs = re.split(r"\n\s*\n", text.strip("\n"))
        return "\n\n".join(
            textwrap.indent(paragraph, indent)
            if re.search(r"^ ", paragraph, re.MULTILINE)
            else textwrap.fill(" ".join(paragraph.split()), width, initial_indent=indent, subsequent_indent=indent)
            for paragraph in paragraphs
        )
