"""Command line of the benchmarks: `python -m bench COMMAND`.

Exit codes: 1 if a run has failed, 2 if nothing could be measured.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from bench.harness.contender import RunFailed
from bench.harness.flags import add_report, write_report
from bench.harness.progress import print_progress
from bench.harness.server import BenchError
from bench.plot import draw_drain
from bench.scenario import Scenario
from bench.scenarios.registry import SCENARIOS
from bench.tiny import run_all
from pgtask.errors import PgtaskError


def main(argv: Sequence[str] | None = None) -> int:
    arguments = build_parser().parse_args(argv)
    try:
        return int(arguments.run(arguments))
    except (BenchError, RunFailed, PgtaskError) as error:
        print(f"bench: {error}", file=sys.stderr)
        return 2


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m bench", description="Measure pgtask.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for scenario in SCENARIOS:
        command = commands.add_parser(scenario.name, help=scenario.help)
        scenario.add_arguments(command)
        add_report(command)
        command.set_defaults(run=partial(run_scenario, scenario))
    plot = commands.add_parser("plot", help="draw the JSON of a drain as an SVG")
    plot.add_argument("file", type=Path, metavar="JSON", help="report of a drain")
    plot.add_argument("svg", type=Path, metavar="SVG", help="file to write the picture to")
    plot.set_defaults(run=run_plot)
    tiny = commands.add_parser("tiny", help="run each scenario once, as small as possible, as a smoke test")
    tiny.set_defaults(run=lambda _: run_all(main))
    return parser


def run_scenario(scenario: Scenario[Any], arguments: argparse.Namespace) -> int:
    report = scenario.measure(arguments, print_progress)
    print(scenario.card(report))
    write_report(arguments.json, report)
    return 1 if report.failures else 0


def run_plot(arguments: argparse.Namespace) -> int:
    arguments.svg.write_text(draw_drain(arguments.file))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
