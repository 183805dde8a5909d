"""The option `--from`: supervisors of other hosts, whose counters `pgtask top` and the console read."""

from __future__ import annotations

import argparse

from pgtask._cli.parser import Parser
from pgtask._observe.remote_fleets import parse_address
from pgtask.errors import ConfigError

__all__ = ["add_from", "addresses_of"]


def add_from(parser: Parser) -> None:
    """Add the option."""
    parser.add_argument(
        "--from",
        dest="addresses",
        action="append",
        default=[],
        metavar="URL",
        help="also read the counters at this --metrics port, as http://worker-7:9464; may be repeated",
    )


def addresses_of(args: argparse.Namespace) -> list[str]:
    """Return the addresses that were given. Raises `ConfigError`."""
    try:
        return [parse_address(text) for text in args.addresses]
    except ValueError as error:
        raise ConfigError(f"--from {error}") from None
