"""Crashes and reloads of workers: what they cost, and a check that no task is lost.

Invariants: rates come from commit times, from the first finished task to the last, and so does the share of a release
of leases or of a restart. All bursts but that with the poison have the same tasks and the same size.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Sequence

import msgspec

from bench.harness.burst import BurstResult, run_chains
from bench.harness.contender import RunFailed
from bench.harness.flags import add_number, add_server
from bench.harness.observers import Observer, RandomKills, Reloads, TimeSpan
from bench.harness.progress import Progress
from bench.harness.report import Setting, card_head, setting_of
from bench.harness.server import BenchError, Server, open_server
from bench.harness.spread import Spread, spread
from bench.scenario import Report
from bench.scenarios.halves import HALVES, HalvesResult, HalvesTerms, halves_lines, measure_halves

__all__ = ["CrashesScenario", "WindowRate", "rate_outside"]

_POISON_AMONG = 10_000


class WindowRate(msgspec.Struct, frozen=True):
    """Tasks finished per second, in a window of `seconds`. `share`: of the undisturbed rate."""

    per_second: float
    seconds: float
    share: float


class RateSpread(msgspec.Struct, frozen=True):
    """The rates of all rounds. `seconds`: of all windows together."""

    per_second: Spread
    seconds: float
    share: Spread


class CrashesReport(Report, frozen=True):
    """Rates and counts of all bursts.

    `lost`, `doubled` and `parked` must be 0. `release_ms`: from a kill until the supervisor logs that it has released
    the orphaned leases. A restart: from a kill until the next worker is ready. `min_ready`: the minimum of ready
    workers during reloads. `other_suspects`: tasks that were implicated in the deaths of the poison's workers
    without being the cause.
    """

    setting: Setting
    tasks: int
    procs: int
    rounds: int
    kills: int
    lost: int
    doubled: int
    parked: int
    release_ms: Spread | None
    undisturbed_per_second: Spread
    with_kills: RateSpread
    outside_releases: RateSpread
    outside_restarts: RateSpread
    reloads: int
    min_ready: int
    reloading: RateSpread
    poison: str
    poison_deaths: int
    other_suspects: int
    halves: list[HalvesResult]

    @property
    def failures(self) -> list[str]:
        counts = {"lost": self.lost, "doubled": self.doubled, "parked": self.parked}
        halves = [failure for result in self.halves for failure in result.failures]
        return [*(f"{count} {name}" for name, count in counts.items() if count), *halves]


class _CrashRound(msgspec.Struct, frozen=True):
    """Three bursts, one after the other, each rate with its share of the rate of the first one."""

    bursts: list[BurstResult]
    releases: list[TimeSpan]
    reloads: list[TimeSpan]
    min_ready: int
    base: WindowRate
    with_kills: WindowRate
    outside_releases: WindowRate
    outside_restarts: WindowRate
    reloading: WindowRate


class CrashesScenario:
    """The command `crashes`: in each round three bursts, then one with a poison, and the cases of `halves`."""

    name = "crashes"
    help = "random kills, reloads, and a task that kills its workers"

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        add_number(parser, "--tasks", 300_000, "tasks of three steps in a burst")
        add_number(parser, "--kills", 200, "workers to kill in a round, while they work")
        add_number(parser, "--procs", 4, "worker processes")
        add_number(parser, "--rounds", 3, "rounds of three bursts: undisturbed, with kills, with reloads")
        parser.add_argument(
            "--halves",
            type=lambda text: [name for name in text.split(",") if name],
            default=list(HALVES),
            metavar="NAMES",
            help=f"cases of tasks that run again in halves, separated by commas (default: {','.join(HALVES)})",
        )
        add_number(parser, "--steps", 400, "steps of `kill` and `segfault`, all under way at once, in two processes")
        parser.add_argument(
            "--step-seconds", type=float, default=2.0, metavar="S", help="duration of each of them (default: 2)"
        )
        add_number(parser, "--among", 10_000, "tasks of `poisons`")
        add_number(parser, "--poisons", 5, "poisons among them")
        add_server(parser)

    def measure(self, arguments: argparse.Namespace, progress: Progress) -> CrashesReport:
        tasks, kills, procs, rounds = arguments.tasks, arguments.kills, arguments.procs, arguments.rounds
        terms = HalvesTerms(
            scenarios=arguments.halves,
            steps=arguments.steps,
            seconds=arguments.step_seconds,
            among=arguments.among,
            poisons=arguments.poisons,
        )
        if unknown := [name for name in terms.scenarios if name not in HALVES]:
            raise BenchError(f"--halves: no scenario {unknown[0]!r}; there are {', '.join(HALVES)}")
        with open_server(arguments.dsn) as server:
            setting = setting_of(server)
            each = [_run_round(server, tasks, kills, procs, number, progress) for number in range(rounds)]
            poison = run_chains(server, _POISON_AMONG, procs, observer := Observer(), poisons=1, code=1)
            progress(f"poison               {[error.partition(chr(10))[0] for error in poison.errors]}")
            halves = measure_halves(server, terms, progress)
        return _crashes_report(setting, tasks, procs, each, poison, observer, halves)

    def card(self, report: CrashesReport) -> str:
        def line(what: str, rates: RateSpread) -> str:
            share = f"{rates.share.median:.2f} ({rates.share.min:.2f} to {rates.share.max:.2f}) of it"
            return f"{what:<27} {rates.per_second.median:,.0f} tasks/s, {share}, measured over {rates.seconds:.1f} s"

        release, base = report.release_ms, report.undisturbed_per_second
        took = f"median {release.median:.0f} ms, longest {release.max:.0f} ms" if release else "none"
        poison = f"{report.poison_deaths} deaths, {report.other_suspects} other suspects; parked: {report.poison}"
        return "\n".join(
            [
                *card_head(
                    report.setting,
                    f"crashes: {report.tasks:,} tasks of 3 steps, {report.procs} processes, {report.rounds} rounds",
                ),
                f"{'kill -9':<27} {report.kills} of workers at work",
                f"{'lost, doubled, parked':<27} {report.lost}, {report.doubled}, {report.parked}",
                f"{'release of orphaned leases':<27} {took}",
                f"{'undisturbed':<27} {base.median:,.0f} tasks/s ({base.min:,.0f} to {base.max:,.0f})",
                line("with the kills", report.with_kills),
                line("  outside the releases", report.outside_releases),
                line("  all workers ready", report.outside_restarts),
                line(f"while {report.reloads} reloads", report.reloading) + f"; at least {report.min_ready} ready",
                f"{f'one poison of {_POISON_AMONG:,}':<27} {poison}",
                *halves_lines(report.halves),
            ]
        )


def _run_round(server: Server, tasks: int, kills: int, procs: int, number: int, progress: Progress) -> _CrashRound:
    quiet = run_chains(server, tasks, procs, Observer())
    base = rate_outside(quiet.commits, [])
    progress(f"undisturbed          {base.per_second:,.0f} tasks/s")
    disturbed = run_chains(server, tasks, procs, random_kills := RandomKills(tasks, kills, seed=number))
    releases, restarts = random_kills.spans()
    until_last_kill = [one for one in disturbed.commits if one[0] <= max(since for since, _ in restarts)]
    with_kills = rate_outside(disturbed.commits, [], base)
    progress(f"{len(releases)} kills            {with_kills.per_second:,.0f} tasks/s")
    rolling = run_chains(server, tasks, procs, reloads := Reloads(tasks, procs))
    progress(f"{len(reloads.spans)} reloads            {rate_outside(rolling.commits, []).per_second:,.0f} tasks/s")
    return _CrashRound(
        bursts=[quiet, disturbed, rolling],
        releases=releases,
        reloads=reloads.spans,
        min_ready=reloads.min_ready,
        base=base,
        with_kills=with_kills,
        outside_releases=rate_outside(until_last_kill, releases, base),
        outside_restarts=rate_outside(until_last_kill, restarts, base),
        reloading=rate_outside(rolling.commits, _spans_between(reloads.spans), base),
    )


def _crashes_report(
    setting: Setting,
    tasks: int,
    procs: int,
    rounds: Sequence[_CrashRound],
    poison: BurstResult,
    observer: Observer,
    halves: list[HalvesResult],
) -> CrashesReport:
    """Summarise the rounds, and the burst with the poison that `observer` has seen."""
    bursts = [*(burst for one in rounds for burst in one.bursts), poison]
    releases = [span for one in rounds for span in one.releases]
    deaths = observer.count_events("worker.died")
    return CrashesReport(
        bench="crashes",
        setting=setting,
        tasks=tasks,
        procs=procs,
        rounds=len(rounds),
        kills=len(releases),
        lost=sum(burst.lost for burst in bursts),
        doubled=sum(burst.doubled for burst in bursts),
        parked=sum(len(burst.errors) for burst in bursts) - 1,
        release_ms=spread([1000 * (until - since) for since, until in releases]) if releases else None,
        undisturbed_per_second=spread([one.base.per_second for one in rounds]),
        with_kills=_spread_rates([one.with_kills for one in rounds]),
        outside_releases=_spread_rates([one.outside_releases for one in rounds]),
        outside_restarts=_spread_rates([one.outside_restarts for one in rounds]),
        reloads=sum(len(one.reloads) for one in rounds),
        min_ready=min(one.min_ready for one in rounds),
        reloading=_spread_rates([one.reloading for one in rounds]),
        poison=", ".join(error.partition("\n")[0] for error in poison.errors),
        poison_deaths=deaths,
        other_suspects=observer.count_events("task.suspect") - deaths + 1,
        halves=halves,
    )


# --- times and rates


def rate_outside(
    commits: Sequence[tuple[float, int]], spans: Iterable[TimeSpan], base: WindowRate | None = None
) -> WindowRate:
    """Return the rate from the first to the last commit, without the time and the tasks within `spans`."""
    if len(commits) < 2:
        raise RunFailed("too few commits for a rate: give it more tasks")
    first, last = commits[0][0], commits[-1][0]
    tasks, seconds, at = sum(count for _, count in commits), last - first, first
    for since, until in sorted(spans):
        since, until = max(since, at), min(until, last)
        if until > since:
            tasks -= sum(count for when, count in commits if since <= when < until)
            seconds -= until - since
            at = until
    rate = tasks / seconds if seconds > 0.001 else 0.0
    return WindowRate(rate, max(seconds, 0.0), rate / base.per_second if base else 1.0)


def _spread_rates(rates: Sequence[WindowRate]) -> RateSpread:
    seconds = sum(rate.seconds for rate in rates)
    return RateSpread(spread([rate.per_second for rate in rates]), seconds, spread([rate.share for rate in rates]))


def _spans_between(spans: Sequence[TimeSpan]) -> list[TimeSpan]:
    """Return the time before the spans, between them, and after them."""
    ends = [0.0, *(end for span in spans for end in span), float("inf")]
    return list(zip(ends[::2], ends[1::2], strict=True))
