"""`python -m bench`: the command line of the benchmarks. Exit code 1 if any run has failed, 2 if none could be made."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from bench.card import card
from bench.contender import RunFailed
from bench.contenders import DEFAULT, choose, find_contenders
from bench.crashes import crashes_card, measure_crashes
from bench.depth import SCENARIOS, DepthTerms, depth_card, measure_depth
from bench.drain import Terms, drain
from bench.enqueue import enqueue_card, measure_enqueue
from bench.flags import add_number, add_peers, add_report, add_server, count, numbers, seconds, whole, write
from bench.flow_peers import DurablePeers
from bench.flows import flows_card, measure_flows
from bench.idle import DEAD_WEIGHT, idle_card, measure_idle
from bench.latency import latency_card, latency_report
from bench.plot import plot
from bench.procs import measure_procs, procs_card
from bench.recover import measure_recover, recover_card
from bench.server import BenchError
from bench.stages import measure_stages, stages_card
from bench.tiny import run_all
from bench.workloads import WORKLOADS
from pgtask._cpus import default_procs
from pgtask.config import Config
from pgtask.errors import PgtaskError


def main(argv: Sequence[str] | None = None) -> int:
    arguments = _parser().parse_args(argv)
    try:
        return int(arguments.run(arguments))
    except (BenchError, RunFailed, PgtaskError) as error:
        print(f"bench: {error}", file=sys.stderr)
        return 2


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m bench", description="Measure pgtask.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    _add_drain(commands.add_parser("drain", help="empty a full table, beside the C floor and the peers"))
    _add_latency(commands.add_parser("latency", help="from the enqueue to the start, on an idle fleet"))
    _add_enqueue(commands.add_parser("enqueue", help="batch enqueue, beside COPY by psql and by asyncpg"))
    _add_idle(commands.add_parser("idle", help="what a fleet costs that has nothing to do"))
    _add_depth(commands.add_parser("depth", help="a deep backlog, dead weight, a foreign snapshot, a cold plan"))
    _add_procs(commands.add_parser("procs", help="how the rate goes with the number of processes"))
    _add_flows(commands.add_parser("flows", help="workflows: recorded steps, trigger to result, replay"))
    _add_recover(commands.add_parser("recover", help="kill -9 of a worker: how long its tasks wait"))
    _add_crashes(commands.add_parser("crashes", help="kills at random, reloads, a task that kills its workers"))
    _add_plot(commands.add_parser("plot", help="draw the JSON of a drain as an SVG"))
    tiny = commands.add_parser("tiny", help="each of our own benchmarks once, very small: does it still run?")
    tiny.set_defaults(run=lambda _: run_all(main))
    _add_stages(commands.add_parser("stages", help="the compiled stages, beside plain Python"))
    return parser


# --- drain


def _drain(arguments: argparse.Namespace) -> int:
    if arguments.list_contenders:
        for name, contender in find_contenders(arguments.peers, arguments.peers_home).items():
            print(f"{name:<13} {contender.about}")
        return 0
    fields = {name: getattr(arguments, name) for name in Terms.__struct_fields__}
    fields["tasks"] = arguments.tasks or WORKLOADS[arguments.workload].tasks
    report = drain(Terms(**fields), _say)
    print(card(report))
    write(arguments.json, report)
    return 1 if report.failures else 0


def _add_drain(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--tasks", type=whole, metavar="N", help="how many tasks there are (default: for some seconds; noop: 200,000)"
    )
    add_number(parser, "--procs", default_procs(), "worker processes, and connections of the floor")
    add_number(parser, "--rounds", 5, "how often each contender runs")
    add_number(parser, "--batch", Config().batch, "most tasks in one claim")
    parser.add_argument("--workload", choices=WORKLOADS, default="noop", help="what a task does (default: noop)")
    parser.add_argument(
        "--latency-seconds",
        type=seconds,
        default=5.0,
        metavar="S",
        help="how long the latency of an idle fleet is measured; 0: not at all (default: 5)",
    )
    add_peers(parser, DEFAULT)
    parser.add_argument("--list-contenders", action="store_true", help="print who could take part, and stop")
    add_server(parser)
    add_report(parser)
    parser.set_defaults(run=_drain)


# --- latency


def _latency(arguments: argparse.Namespace) -> int:
    chosen = choose(arguments.contenders, find_contenders(arguments.peers, arguments.peers_home))
    report = latency_report(
        list(chosen),
        rates=[float(rate) for rate in arguments.per_second],
        procs=arguments.procs,
        seconds=arguments.seconds,
        dsn=arguments.dsn,
        say=_say,
    )
    print(latency_card(report))
    write(arguments.json, report)
    return 1 if report.failures else 0


def _add_latency(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--per-second", type=numbers, default=[50, 100, 1000], metavar="N,N", help="rates (default: 50,100,1000)"
    )
    add_number(parser, "--procs", default_procs(), "worker processes")
    parser.add_argument("--seconds", type=seconds, default=10.0, metavar="S", help="at each rate (default: 10)")
    add_peers(parser, "pgtask")
    add_server(parser)
    add_report(parser)
    parser.set_defaults(run=_latency)


# --- enqueue


def _enqueue(arguments: argparse.Namespace) -> int:
    report = measure_enqueue(
        tasks=arguments.tasks, rounds=arguments.rounds, workload=arguments.workload, dsn=arguments.dsn, say=_say
    )
    print(enqueue_card(report))
    write(arguments.json, report)
    return 0


def _add_enqueue(parser: argparse.ArgumentParser) -> None:
    add_number(parser, "--tasks", 1_000_000, "how many there are")
    add_number(parser, "--rounds", 5, "how often each way is gone")
    parser.add_argument("--workload", choices=WORKLOADS, default="noop", help="what they carry (default: noop)")
    add_server(parser)
    add_report(parser)
    parser.set_defaults(run=_enqueue)


# --- idle


def _idle(arguments: argparse.Namespace) -> int:
    report = measure_idle(
        procs=arguments.procs,
        settle=arguments.settle,
        seconds=arguments.seconds,
        weight={kind: getattr(arguments, kind) for kind in DEAD_WEIGHT},
        dsn=arguments.dsn,
        say=_say,
    )
    print(idle_card(report))
    write(arguments.json, report)
    return 0


def _add_idle(parser: argparse.ArgumentParser) -> None:
    add_number(parser, "--procs", 8, "worker processes")
    parser.add_argument("--seconds", type=seconds, default=60.0, metavar="S", help="how long (default: 60)")
    parser.add_argument("--settle", type=seconds, default=15.0, metavar="S", help="left alone before (default: 15)")
    for kind in DEAD_WEIGHT:
        parser.add_argument(
            f"--{kind}", type=count, default=0, metavar="N", help=f"{kind} tasks in the table (default: 0)"
        )
    add_server(parser)
    add_report(parser)
    parser.set_defaults(run=_idle)


# --- depth


def _depth(arguments: argparse.Namespace) -> int:
    fields = {name: getattr(arguments, name) for name in DepthTerms.__struct_fields__}
    unknown = set(arguments.scenarios) - {*SCENARIOS, "cold"}
    if unknown:
        raise BenchError(f"unknown scenarios: {', '.join(sorted(unknown))}; there are: {', '.join(SCENARIOS)}, cold")
    report = measure_depth(DepthTerms(**fields), arguments.dsn, _say)
    print(depth_card(report))
    write(arguments.json, report)
    return 1 if report.failures else 0


def _add_depth(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--scenarios",
        type=lambda text: text.split(","),
        default=[*SCENARIOS, "cold"],
        metavar="NAMES",
        help=f"with commas (default: {','.join(SCENARIOS)},cold)",
    )
    add_number(parser, "--shallow", 100_000, "few runnable tasks")
    add_number(parser, "--deep", 3_000_000, "many runnable tasks")
    for kind, default in (("future", 3_000_000), ("parked", 1_000_000), ("leased", 1_000_000)):
        parser.add_argument(
            f"--{kind}", type=count, default=default, metavar="N", help=f"dead weight, {kind} (default: {default:,})"
        )
    add_number(parser, "--procs", default_procs(), "worker processes")
    add_number(parser, "--rounds", 3, "how often each scenario is run")
    add_number(parser, "--claims", 500, "claims that are timed with the cold plan")
    add_server(parser)
    add_report(parser)
    parser.set_defaults(run=_depth)


# --- procs


def _procs(arguments: argparse.Namespace) -> int:
    report = measure_procs(
        counts=arguments.counts,
        tasks=arguments.tasks,
        rounds=arguments.rounds,
        batch=arguments.batch,
        workload=arguments.workload,
        dsn=arguments.dsn,
        say=_say,
    )
    print(procs_card(report))
    write(arguments.json, report)
    return 1 if report.failures else 0


def _add_procs(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--counts", type=numbers, default=[1, 2, 4, 8, 16], metavar="N,N", help="processes (default: 1,2,4,8,16)"
    )
    add_number(parser, "--tasks", 200_000, "how many tasks there are")
    add_number(parser, "--rounds", 5, "how often each count runs")
    add_number(parser, "--batch", Config().batch, "most tasks in one claim")
    parser.add_argument("--workload", choices=WORKLOADS, default="noop", help="what a task does (default: noop)")
    add_server(parser)
    add_report(parser)
    parser.set_defaults(run=_procs)


# --- recover


def _recover(arguments: argparse.Namespace) -> int:
    report = measure_recover(
        procs=arguments.procs,
        tasks=arguments.tasks,
        step_seconds=arguments.step_seconds,
        lease_timeout=arguments.lease_timeout,
        rounds=arguments.rounds,
        dsn=arguments.dsn,
        say=_say,
    )
    print(recover_card(report))
    write(arguments.json, report)
    return 0


def _add_recover(parser: argparse.ArgumentParser) -> None:
    add_number(parser, "--procs", 2, "worker processes")
    add_number(parser, "--tasks", 100, "tasks under way when the worker is killed")
    add_number(parser, "--rounds", 5, "how many workers are killed")
    parser.add_argument("--step-seconds", type=seconds, default=3.0, metavar="S", help="of each step (default: 3)")
    lease = Config().lease_timeout
    parser.add_argument(
        "--lease-timeout", type=seconds, default=lease, metavar="S", help=f"of the workers (default: {lease:g})"
    )
    add_server(parser)
    add_report(parser)
    parser.set_defaults(run=_recover)


# --- flows


def _flows(arguments: argparse.Namespace) -> int:
    peers = DurablePeers(
        arguments.contenders,
        arguments.peer_runs,
        arguments.procs,
        peers=arguments.peers,
        homes=arguments.peers_home,
        say=_say,
    )
    report = measure_flows(
        runs=arguments.runs,
        procs=arguments.procs,
        concurrent=arguments.concurrent,
        rounds=arguments.rounds,
        samples=arguments.samples,
        steps=arguments.steps,
        peers=peers,
        dsn=arguments.dsn,
        say=_say,
    )
    print(flows_card(report))
    write(arguments.json, report)
    return 1 if report.failures else 0


def _add_flows(parser: argparse.ArgumentParser) -> None:
    add_number(parser, "--runs", 10_000, "runs of five steps")
    add_number(parser, "--procs", default_procs(), "worker processes")
    add_number(parser, "--concurrent", 500, "runs under way at once, in all of them")
    add_number(parser, "--rounds", 5, "how often")
    add_number(parser, "--samples", 100, "times from the trigger to the result")
    add_number(parser, "--steps", 1000, "recorded steps of the run that is replayed")
    add_number(parser, "--peer-runs", 2_000, "runs of five steps of each durable peer")
    add_peers(parser, "")
    add_server(parser)
    add_report(parser)
    parser.set_defaults(run=_flows)


# --- crashes


def _crashes(arguments: argparse.Namespace) -> int:
    report = measure_crashes(
        tasks=arguments.tasks,
        kills=arguments.kills,
        procs=arguments.procs,
        rounds=arguments.rounds,
        dsn=arguments.dsn,
        say=_say,
    )
    print(crashes_card(report))
    write(arguments.json, report)
    return 1 if report.failures else 0


def _add_crashes(parser: argparse.ArgumentParser) -> None:
    add_number(parser, "--tasks", 300_000, "of three steps each")
    add_number(parser, "--kills", 200, "how many workers are killed while they work, in a round")
    add_number(parser, "--procs", 4, "worker processes")
    add_number(parser, "--rounds", 3, "undisturbed, with kills and with reloads, so many times in turn")
    add_server(parser)
    add_report(parser)
    parser.set_defaults(run=_crashes)


# --- plot


def _plot(arguments: argparse.Namespace) -> int:
    arguments.svg.write_text(plot(arguments.file))
    return 0


def _add_plot(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", type=Path, metavar="JSON", help="what a drain has written")
    parser.add_argument("svg", type=Path, metavar="SVG", help="where the picture goes")
    parser.set_defaults(run=_plot)


# --- stages


def _stages(arguments: argparse.Namespace) -> int:
    report = measure_stages(tasks=arguments.tasks, rounds=arguments.rounds)
    print(stages_card(report))
    write(arguments.json, report)
    return 0


def _add_stages(parser: argparse.ArgumentParser) -> None:
    add_number(parser, "--tasks", 100_000, "in a round")
    add_number(parser, "--rounds", 5, "how many there are")
    add_report(parser)
    parser.set_defaults(run=_stages)


if __name__ == "__main__":
    raise SystemExit(main())
