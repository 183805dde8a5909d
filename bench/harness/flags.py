"""Flags that several commands have, and the types of their values."""

from __future__ import annotations

import argparse
from pathlib import Path

import msgspec

from bench.harness.paths import PEERS, PEERS_HOME
from bench.workloads.workload import WORKLOADS
from pgtask.config import Config

__all__ = [
    "add_batch",
    "add_number",
    "add_peers",
    "add_report",
    "add_server",
    "add_workload",
    "natural_number",
    "positive_number",
    "positive_numbers",
    "seconds",
    "write_report",
]


def add_number(parser: argparse.ArgumentParser, flag: str, default: int, text: str) -> None:
    parser.add_argument(flag, type=positive_number, default=default, metavar="N", help=f"{text} (default: {default:,})")


def add_batch(parser: argparse.ArgumentParser) -> None:
    add_number(parser, "--batch", Config().batch, "maximum number of tasks in one claim")


def add_workload(parser: argparse.ArgumentParser, text: str) -> None:
    parser.add_argument("--workload", choices=WORKLOADS, default="noop", help=f"{text} (default: noop)")


def add_server(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--dsn", help="server to measure on, as a superuser and its only client (default: a throwaway server)"
    )


def add_report(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the whole report to this file as well")


def add_peers(parser: argparse.ArgumentParser, default: str) -> None:
    parser.add_argument(
        "--contenders",
        default=default,
        metavar="NAMES",
        help=f"contenders to measure, separated by commas, or `all` (default: {default or 'none'})",
    )
    parser.add_argument("--peers", type=Path, default=PEERS, metavar="DIR", help="directory that describes the peers")
    parser.add_argument(
        "--peers-home",
        type=Path,
        default=PEERS_HOME,
        metavar="DIR",
        help="directory to install the peers in (default: .bench)",
    )


def write_report(file: Path | None, report: msgspec.Struct) -> None:
    if file is not None:
        file.write_bytes(msgspec.json.format(msgspec.json.encode(report, enc_hook=str)) + b"\n")


# --- types of values: argparse names them in its errors


def seconds(text: str) -> float:
    if not 0 <= (number := float(text)) < 3600:
        raise ValueError("seconds")
    return number


def natural_number(text: str) -> int:
    number = int(text.replace("_", ""))
    if number < 0:
        raise ValueError("0 or more")
    return number


def positive_number(text: str) -> int:
    number = int(text.replace("_", ""))
    if number < 1:
        raise ValueError("1 or more")
    return number


def positive_numbers(text: str) -> list[int]:
    """Read whole numbers separated by commas."""
    return [positive_number(word) for word in text.split(",")]
