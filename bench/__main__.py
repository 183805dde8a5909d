"""`python -m bench`: the command line of the benchmarks. Exit code 1 if any run has failed, 2 if none could be made."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import msgspec

from bench.card import card
from bench.drain import Terms, drain
from bench.server import BenchError
from bench.stages import measure_stages, stages_card
from bench.workloads import WORKLOADS
from pgtask._cpus import default_procs
from pgtask.config import Config
from pgtask.errors import PgtaskError


def main(argv: Sequence[str] | None = None) -> int:
    arguments = _parser().parse_args(argv)
    try:
        return int(arguments.run(arguments))
    except (BenchError, PgtaskError) as error:
        print(f"bench: {error}", file=sys.stderr)
        return 2


def _drain(arguments: argparse.Namespace) -> int:
    fields = {name: getattr(arguments, name) for name in Terms.__struct_fields__}
    report = drain(Terms(**fields), say=lambda line: print(line, file=sys.stderr, flush=True))
    print(card(report))
    _write(arguments.json, report)
    return 1 if report.failures else 0


def _stages(arguments: argparse.Namespace) -> int:
    report = measure_stages(tasks=arguments.tasks, rounds=arguments.rounds)
    print(stages_card(report))
    _write(arguments.json, report)
    return 0


def _write(file: Path | None, report: msgspec.Struct) -> None:
    if file is not None:
        file.write_bytes(msgspec.json.format(msgspec.json.encode(report)) + b"\n")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m bench", description="Measure pgtask.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    _add_drain(commands.add_parser("drain", help="empty a full table, beside the C floor"))
    _add_stages(commands.add_parser("stages", help="the compiled stages, beside plain Python"))
    return parser


def _add_drain(parser: argparse.ArgumentParser) -> None:
    def number(flag: str, default: int, text: str) -> None:
        parser.add_argument(flag, type=_whole, default=default, metavar="N", help=f"{text} (default: {default})")

    number("--tasks", 200_000, "how many tasks there are")
    number("--procs", default_procs(), "worker processes, and connections of the floor")
    number("--rounds", 5, "how often each contender runs")
    number("--batch", Config().batch, "most tasks in one claim")
    parser.add_argument("--workload", choices=WORKLOADS, default="noop", help="what a task does (default: noop)")
    parser.add_argument(
        "--latency-seconds",
        type=_seconds,
        default=5.0,
        metavar="S",
        help="how long the latency of an idle fleet is measured; 0: not at all (default: 5)",
    )
    parser.add_argument("--dsn", help="measure on this server, as a superuser, with nobody else on it; else on our own")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything to this file as well")
    parser.set_defaults(run=_drain)


def _add_stages(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--tasks", type=_whole, default=100_000, metavar="N", help="in a round (default: 100000)")
    parser.add_argument("--rounds", type=_whole, default=5, metavar="N", help="how many there are (default: 5)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything to this file as well")
    parser.set_defaults(run=_stages)


def _seconds(text: str) -> float:
    if not 0 <= (number := float(text)) < 3600:
        raise ValueError("seconds")
    return number


def _whole(text: str) -> int:
    number = int(text)
    if number < 1:
        raise ValueError("1 or more")
    return number


if __name__ == "__main__":
    raise SystemExit(main())
