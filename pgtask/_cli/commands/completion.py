"""`pgtask completion`: print a script that completes the words of both programs in a shell."""

from __future__ import annotations

import argparse

from pgtask._cli.completion import SHELLS, describe_parser
from pgtask._cli.output import write_lines
from pgtask._cli.parser import Parser

__all__ = ["HELP", "SUMMARY", "add_arguments", "run"]

SUMMARY = "complete words in your shell"
HELP = """\
Print a script for bash, zsh or fish that completes commands, flags and their choices, of pgtask and of
pgtask-supervisor. It is made from this version: print it again after an upgrade, or let your shell do that at its
start.

    source <(pgtask completion bash)   # ~/.bashrc
    source <(pgtask completion zsh)    # ~/.zshrc
    pgtask completion fish | source    # config.fish
"""


def add_arguments(parser: Parser) -> None:
    parser.add_argument("shell", choices=list(SHELLS), help="the shell: bash, zsh or fish")


def run(args: argparse.Namespace) -> int:
    from pgtask._cli import main, supervisor  # they know all commands, this one too

    summaries = {name: command.SUMMARY for name, command in main.COMMANDS.items()}
    programs = [
        describe_parser(main.build_parser(), "pgtask", summaries=summaries),
        describe_parser(supervisor.build_parser(), supervisor.PROGRAM, choices=supervisor.CHOICES),
    ]
    write_lines([SHELLS[args.shell](programs)], end="")
    return 0
