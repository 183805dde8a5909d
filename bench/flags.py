"""Flags that several commands have, and how their text is read."""

from __future__ import annotations

import argparse
from pathlib import Path

import msgspec

from bench.peer import HOME, PEERS

__all__ = ["add_number", "add_peers", "add_report", "add_server", "count", "numbers", "seconds", "whole", "write"]


def add_number(parser: argparse.ArgumentParser, flag: str, default: int, text: str) -> None:
    parser.add_argument(flag, type=whole, default=default, metavar="N", help=f"{text} (default: {default:,})")


def add_server(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--dsn", help="measure on this server, as a superuser, with nobody else on it; else on our own")


def add_report(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything to this file as well")


def add_peers(parser: argparse.ArgumentParser, default: str) -> None:
    parser.add_argument(
        "--contenders",
        default=default,
        metavar="NAMES",
        help=f"who takes part, with commas, or all (default: {default or 'nobody'})",
    )
    parser.add_argument("--peers", type=Path, default=PEERS, metavar="DIR", help="where the peers are described")
    parser.add_argument(
        "--peers-home", type=Path, default=HOME, metavar="DIR", help="where they are installed (default: .bench)"
    )


def write(file: Path | None, report: msgspec.Struct) -> None:
    if file is not None:
        file.write_bytes(msgspec.json.format(msgspec.json.encode(report, enc_hook=str)) + b"\n")


def seconds(text: str) -> float:
    if not 0 <= (number := float(text)) < 3600:
        raise ValueError("seconds")
    return number


def count(text: str) -> int:
    number = int(text.replace("_", ""))
    if number < 0:
        raise ValueError("0 or more")
    return number


def whole(text: str) -> int:
    number = int(text.replace("_", ""))
    if number < 1:
        raise ValueError("1 or more")
    return number


def numbers(text: str) -> list[int]:
    """Whole numbers with commas."""
    return [whole(word) for word in text.split(",")]
