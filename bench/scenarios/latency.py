"""Latency of an idle fleet: from the call of `enqueue` to the start of the step, at several rates.

Invariant: the load is bounded and open, so that a later enqueue does not hide a slow start.
"""

from __future__ import annotations

import argparse

import msgspec

from bench.contenders.registry import choose_contenders, find_contenders
from bench.harness.contender import ContenderSkipped, Latency, RunFailed
from bench.harness.flags import add_number, add_peers, add_server, positive_numbers, seconds
from bench.harness.machine import machine_facts
from bench.harness.progress import Progress
from bench.harness.report import failure_lines, setting_of
from bench.harness.server import BenchError, open_server
from bench.scenario import Report
from bench.workloads.workload import WORKLOADS
from pgtask._cpus import default_procs

__all__ = ["LatencyScenario"]


class LatencyReport(Report, frozen=True):
    """Each contender at each rate, one after the other."""

    at: str
    commit: str
    machine: dict[str, str | int | float]
    versions: dict[str, str]
    server: str
    settings: dict[str, str]
    procs: int
    seconds: float
    latency: dict[str, list[Latency]]
    failures: list[str]


class LatencyScenario:
    """The command `latency`."""

    name = "latency"
    help = "time from the enqueue to the start of the step, on an idle fleet"

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        parser.add_argument(
            "--per-second",
            type=positive_numbers,
            default=[50, 100, 1000],
            metavar="N,N",
            help="rates (default: 50,100,1000)",
        )
        add_number(parser, "--procs", default_procs(), "worker processes")
        parser.add_argument(
            "--seconds", type=seconds, default=10.0, metavar="S", help="duration of each rate (default: 10)"
        )
        add_peers(parser, "pgtask")
        add_server(parser)

    def measure(self, arguments: argparse.Namespace, progress: Progress) -> LatencyReport:
        contenders = choose_contenders(arguments.contenders, find_contenders(arguments.peers, arguments.peers_home))
        found: dict[str, list[Latency]] = {}
        failures: list[str] = []
        machine = machine_facts()
        with open_server(arguments.dsn) as server:
            for contender in contenders:
                try:
                    if not contender.can_measure_latency:
                        raise ContenderSkipped("it measures no latency")
                    contender.prepare(WORKLOADS["noop"])
                except ContenderSkipped as reason:
                    progress(f"skipped {contender.name}: {reason}")
                    continue
                for rate in arguments.per_second:
                    progress(f"{contender.name} at {rate:g}/s for {arguments.seconds:g} s")
                    try:
                        latency = contender.measure_latency(
                            server, procs=arguments.procs, per_second=float(rate), seconds=arguments.seconds
                        )
                        found.setdefault(contender.name, []).append(latency)
                    except (RunFailed, BenchError) as error:
                        failures.append(f"{contender.name} at {rate:g}/s: {error}")
            return LatencyReport(
                bench="latency",
                procs=arguments.procs,
                seconds=arguments.seconds,
                latency=found,
                failures=failures,
                **msgspec.structs.asdict(setting_of(server, machine)),
            )

    def card(self, report: LatencyReport) -> str:
        lines = [
            f"latency of an idle fleet of {report.procs} processes, {report.seconds:g} s at each rate, ms; "
            "enqueue is the call with its commit, start is from that call to the first line of the step",
            f"{'':<14}{'a second':>10}{'samples':>9}{'enqueue p50':>13}{'p99':>9}{'start p50':>11}{'p99':>9}{'max':>9}",
        ]
        for name, rates in report.latency.items():
            for one in rates:
                maximum = "" if one.start_max is None else f"{one.start_max:.2f}"
                lines.append(
                    f"{name:<14}{one.per_second:>10g}{one.samples:>9}{one.enqueue_p50:>13.2f}{one.enqueue_p99:>9.2f}"
                    f"{one.start_p50:>11.2f}{one.start_p99:>9.2f}{maximum:>9}"
                )
        return "\n".join(lines + failure_lines(report.failures))
