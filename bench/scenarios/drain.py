"""Drain: every contender empties a full table, one after the other in each round, on the same server.

Invariants: those of `bench.harness.rounds`; the report names each contender that cannot take part, with the reason.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import msgspec

from bench.contenders.pgtask import Pgtask
from bench.contenders.registry import DEFAULT, choose_contenders, find_contenders
from bench.harness.contender import Contender, Latency, RunFailed
from bench.harness.flags import (
    add_batch,
    add_number,
    add_peers,
    add_server,
    add_workload,
    positive_number,
    seconds,
)
from bench.harness.machine import machine_facts
from bench.harness.progress import Progress
from bench.harness.report import setting_of
from bench.harness.rounds import Entrant, prepare_contenders, rotated, run_contender
from bench.harness.server import BenchError, Server, open_server
from bench.harness.summary import ContenderRun, summarise
from bench.scenarios.drain_report import DrainReport, DrainTerms, drain_card
from bench.workloads.workload import WORKLOADS, Workload
from pgtask._cpus import default_procs
from pgtask._postgres.store import HOT_SETTINGS

__all__ = ["DrainScenario"]

LATENCY_PER_SECOND = 50.0


class DrainScenario:
    """The command `drain`."""

    name = "drain"
    help = "empty a full table, beside the C floor and the peers"

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        parser.add_argument(
            "--tasks", type=positive_number, metavar="N", help="tasks (default: enough for some seconds; noop: 200,000)"
        )
        add_number(parser, "--procs", default_procs(), "worker processes, and connections of the floor")
        add_number(parser, "--rounds", 5, "runs of each contender")
        add_batch(parser)
        add_workload(parser, "task to run")
        parser.add_argument(
            "--latency-seconds",
            type=seconds,
            default=5.0,
            metavar="S",
            help="duration of the measurement of latency, on an idle fleet; 0 leaves it out (default: 5)",
        )
        add_peers(parser, DEFAULT)
        parser.add_argument("--list-contenders", action="store_true", help="list all contenders and exit")
        add_server(parser)

    def measure(self, arguments: argparse.Namespace, progress: Progress) -> DrainReport:
        """Run all rounds, then measure the latency of each contender that can. Exits after `--list-contenders`."""
        found = find_contenders(arguments.peers, arguments.peers_home)
        if arguments.list_contenders:
            print("\n".join(f"{name:<13} {contender.about}" for name, contender in found.items()))
            raise SystemExit(0)
        fields = {name: getattr(arguments, name) for name in DrainTerms.__struct_fields__}
        fields["tasks"] = arguments.tasks or WORKLOADS[arguments.workload].tasks
        return _measure(DrainTerms(**fields), choose_contenders(arguments.contenders, found), progress)

    def card(self, report: DrainReport) -> str:
        return drain_card(report)


def _measure(terms: DrainTerms, chosen: Sequence[Contender], progress: Progress) -> DrainReport:
    workload = WORKLOADS[terms.workload]
    machine = machine_facts()
    contenders, entrants, skipped = prepare_contenders(chosen, terms.tasks, terms.procs, workload, progress)
    if not contenders:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in skipped.items())
        raise BenchError(f"no contender can take part: {reasons}")
    with open_server(terms.dsn) as server:
        progress(f"{server.version.split(',')[0]}; fsync and synchronous_commit are on")
        runs, rates = _run_rounds(server, terms, workload, contenders, entrants, progress)
        latency, failed = _measure_latencies(server, terms, contenders, progress)
        return DrainReport(
            bench="drain",
            command=_command_line(terms),
            session_settings=HOT_SETTINGS,
            terms=_without_paths(terms),
            steps_per_task=workload.steps,
            contenders=entrants,
            skipped=skipped,
            runs=runs,
            summary=summarise(runs, reference=Pgtask.name),
            enqueue_many_per_second=rates,
            latency=latency,
            latency_failed=failed,
            **msgspec.structs.asdict(setting_of(server, machine)),
        )


def _run_rounds(
    server: Server,
    terms: DrainTerms,
    workload: Workload,
    contenders: Sequence[Contender],
    entrants: dict[str, Entrant],
    progress: Progress,
) -> tuple[list[ContenderRun], list[float]]:
    """Return all runs, and the rate of each fill by `enqueue_many`."""
    runs, rates = [], []
    for number in range(1, terms.rounds + 1):
        for contender in rotated(contenders, number):
            entrant = entrants[contender.name]
            run, rate = run_contender(
                server, contender, workload, tasks=entrant.tasks, procs=entrant.procs, batch=terms.batch, number=number
            )
            runs.append(run)
            if rate is not None:
                rates.append(rate)
            result = f"failed: {run.failed}" if run.failed else f"{run.tasks_per_second:,.0f} tasks/s"
            progress(f"round {number} of {terms.rounds}  {contender.name:<12} {result}")
    return runs, rates


def _measure_latencies(
    server: Server, terms: DrainTerms, contenders: Sequence[Contender], progress: Progress
) -> tuple[dict[str, Latency], dict[str, str]]:
    """Return the latency of each contender that can measure it, and the reason for each failure."""
    found: dict[str, Latency] = {}
    failed: dict[str, str] = {}
    rate, duration = LATENCY_PER_SECOND, terms.latency_seconds
    for contender in contenders if duration else ():
        if not contender.can_measure_latency:
            continue
        progress(f"latency of {contender.name} at {rate:g}/s for {duration:g} s")
        try:
            found[contender.name] = contender.measure_latency(
                server, procs=terms.procs, per_second=rate, seconds=duration
            )
        except (RunFailed, BenchError) as error:
            failed[contender.name] = str(error)
    return found, failed


def _without_paths(terms: DrainTerms) -> DrainTerms:
    """Remove what others must not see: the paths of this machine, and the DSN, which may hold a password."""
    return msgspec.structs.replace(
        terms,
        dsn=None if terms.dsn is None else "...",
        peers=Path(terms.peers.name),
        peers_home=Path(terms.peers_home.name),
    )


def _command_line(terms: DrainTerms) -> str:
    """Return the command that repeats this measurement."""
    values = msgspec.structs.asdict(_without_paths(terms))
    del values["peers"], values["peers_home"]
    flags = (f"--{name.replace('_', '-')} {value}" for name, value in values.items() if value is not None)
    return " ".join(["python -m bench drain", *flags])
