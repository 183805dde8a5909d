"""Workers die at random, are killed by a task, or are replaced: what it costs, and that nothing is lost.

Invariants: rates come from commit times, from the first task that is finished to the last; what falls into a handover
or a restart is told apart by them. All bursts are of the same tasks and the same size, but for that with the poison.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import msgspec

from bench.contender import RunFailed
from bench.parts import Setting, head, setting_of
from bench.server import Server, open_server
from bench.spread import Spread, spread
from bench.storm import Burst, Killing, Reloading, Span, Watching, burst

__all__ = ["CrashesReport", "Rate", "crashes_card", "measure_crashes", "outside"]

_POISON_AMONG = 10_000


class Rate(msgspec.Struct, frozen=True):
    """Tasks finished per second of the `seconds` that it was measured in, and the share of the undisturbed rate."""

    per_second: float
    seconds: float
    share: float


class Rates(msgspec.Struct, frozen=True):
    """A `Rate` of each round; `seconds` in all."""

    per_second: Spread
    seconds: float
    share: Spread


class CrashesReport(msgspec.Struct, frozen=True):
    """`lost`, `doubled` and `parked` must be 0. A handover: from the kill until the supervisor says that the leases are
    given back; a restart: until the next worker is ready. `least_ready`: workers, while all are being replaced.
    `suspects`: of the tasks that had nothing to do with the death of the poison's worker, charged with it."""

    bench: str
    setting: Setting
    tasks: int
    procs: int
    rounds: int
    kills: int
    lost: int
    doubled: int
    parked: int
    handover_ms: Spread | None
    undisturbed_per_second: Spread
    with_kills: Rates
    outside_handovers: Rates
    outside_restarts: Rates
    reloads: int
    least_ready: int
    reloading: Rates
    poison: str
    poison_deaths: int
    suspects: int

    @property
    def failures(self) -> list[str]:
        found = {"lost": self.lost, "doubled": self.doubled, "parked": self.parked}
        return [f"{count} {what}" for what, count in found.items() if count]


class _Round(msgspec.Struct, frozen=True):
    """Three bursts one after the other, each rate with its share of the first one's."""

    bursts: list[Burst]
    handovers: list[Span]
    spans: list[Span]
    least_ready: int
    base: Rate
    with_kills: Rate
    outside_handovers: Rate
    outside_restarts: Rate
    reloading: Rate


def measure_crashes(
    *, tasks: int, kills: int, procs: int, rounds: int, dsn: str | None, say: Callable[[str], None]
) -> CrashesReport:
    """In each round three bursts: undisturbed, with kills, with reloads; then one with a poison among 10,000. Raises
    `RunFailed`."""
    with open_server(dsn) as server:
        setting = setting_of(server)
        each = [_round(server, tasks, kills, procs, number, say) for number in range(rounds)]
        poison = burst(server, _POISON_AMONG, procs, poisoned := Watching(), poisons=1, code=1)
        say(f"poison               {[error.partition(chr(10))[0] for error in poison.errors]}")
    bursts = [*(one for part in each for one in part.bursts), poison]
    handovers = [span for part in each for span in part.handovers]
    return CrashesReport(
        bench="crashes",
        setting=setting,
        tasks=tasks,
        procs=procs,
        rounds=rounds,
        kills=len(handovers),
        lost=sum(one.lost for one in bursts),
        doubled=sum(one.doubled for one in bursts),
        parked=sum(len(one.errors) for one in bursts) - 1,
        handover_ms=spread([1000 * (until - since) for since, until in handovers]) if handovers else None,
        undisturbed_per_second=spread([part.base.per_second for part in each]),
        with_kills=_rates([part.with_kills for part in each]),
        outside_handovers=_rates([part.outside_handovers for part in each]),
        outside_restarts=_rates([part.outside_restarts for part in each]),
        reloads=sum(len(part.spans) for part in each),
        least_ready=min(part.least_ready for part in each),
        reloading=_rates([part.reloading for part in each]),
        poison=", ".join(error.partition("\n")[0] for error in poison.errors),
        poison_deaths=poisoned.count("worker.died"),
        suspects=poisoned.count("task.suspect") - poisoned.count("worker.died") + 1,
    )


def _round(server: Server, tasks: int, kills: int, procs: int, number: int, say: Callable[[str], None]) -> _Round:
    quiet = burst(server, tasks, procs, Watching())
    base = outside(quiet.commits, [])
    say(f"undisturbed          {base.per_second:,.0f} tasks/s")
    stormy = burst(server, tasks, procs, killing := Killing(tasks, kills, seed=number))
    handovers, restarts = killing.spans()
    disturbed = [one for one in stormy.commits if one[0] <= max(since for since, _ in restarts)]
    with_kills = outside(stormy.commits, [], base)
    say(f"{len(handovers)} kills            {with_kills.per_second:,.0f} tasks/s")
    rolling = burst(server, tasks, procs, reloading := Reloading(tasks, procs))
    say(f"{len(reloading.spans)} reloads            {outside(rolling.commits, []).per_second:,.0f} tasks/s")
    return _Round(
        bursts=[quiet, stormy, rolling],
        handovers=handovers,
        spans=reloading.spans,
        least_ready=reloading.least_ready,
        base=base,
        with_kills=with_kills,
        outside_handovers=outside(disturbed, handovers, base),
        outside_restarts=outside(disturbed, restarts, base),
        reloading=outside(rolling.commits, _between(reloading.spans), base),
    )


def crashes_card(report: CrashesReport) -> str:
    def line(what: str, rates: Rates) -> str:
        share = f"{rates.share.median:.2f} ({rates.share.min:.2f} to {rates.share.max:.2f}) of it"
        return f"{what:<25} {rates.per_second.median:,.0f} tasks/s, {share}, measured over {rates.seconds:.1f} s"

    handover, base = report.handover_ms, report.undisturbed_per_second
    took = f"median {handover.median:.0f} ms, longest {handover.max:.0f} ms" if handover else "none"
    poison = f"{report.poison_deaths} deaths, {report.suspects} other suspects; parked: {report.poison}"
    return "\n".join(
        [
            *head(
                report.setting,
                f"crashes: {report.tasks:,} tasks of 3 steps, {report.procs} processes, {report.rounds} rounds",
            ),
            f"{'kill -9':<25} {report.kills} of workers at work",
            f"{'lost, doubled, parked':<25} {report.lost}, {report.doubled}, {report.parked}",
            f"{'handover':<25} {took}",
            f"{'undisturbed':<25} {base.median:,.0f} tasks/s ({base.min:,.0f} to {base.max:,.0f})",
            line("with the kills", report.with_kills),
            line("  outside the handovers", report.outside_handovers),
            line("  all workers ready", report.outside_restarts),
            line(f"while {report.reloads} reloads", report.reloading) + f"; {report.least_ready} ready at least",
            f"{f'one poison of {_POISON_AMONG:,}':<25} {poison}",
        ]
    )


# --- times and rates


def outside(commits: Sequence[tuple[float, int]], spans: Iterable[Span], base: Rate | None = None) -> Rate:
    """The rate from the first to the last commit, without what falls into `spans`."""
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
    return Rate(rate, max(seconds, 0.0), rate / base.per_second if base else 1.0)


def _rates(rates: Sequence[Rate]) -> Rates:
    seconds = sum(rate.seconds for rate in rates)
    return Rates(spread([rate.per_second for rate in rates]), seconds, spread([rate.share for rate in rates]))


def _between(spans: Sequence[Span]) -> list[Span]:
    """What lies around the spans and between them."""
    ends = [0.0, *(end for span in spans for end in span), float("inf")]
    return list(zip(ends[::2], ends[1::2], strict=True))
