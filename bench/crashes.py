"""Workers die at random, are killed by a task, or are replaced: what it costs, and that nothing is lost.

Invariants: rates come from commit times, from the first task that is finished to the last; what falls into a handover
or a restart is told apart by them. All bursts are of the same tasks and the same size, but for that with the poison.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import msgspec

from bench.contender import RunFailed
from bench.parts import Setting, head, setting_of
from bench.server import open_server
from bench.spread import Spread, spread
from bench.storm import Killing, Reloading, Span, Watching, burst

__all__ = ["CrashesReport", "Rate", "crashes_card", "measure_crashes", "outside"]

_POISON_AMONG = 10_000


class Rate(msgspec.Struct, frozen=True):
    """Tasks finished per second of the `seconds` that it was measured in, and the share of the undisturbed rate."""

    per_second: float
    seconds: float
    share: float


class CrashesReport(msgspec.Struct, frozen=True):
    """`lost`, `doubled` and `parked` must be 0. A handover: from the kill until the supervisor says that the leases are
    given back; a restart: until the next worker is ready. `least_ready`: workers, while all are being replaced.
    `suspects`: of the tasks that had nothing to do with the death of the poison's worker, charged with it."""

    bench: str
    setting: Setting
    tasks: int
    procs: int
    kills: int
    lost: int
    doubled: int
    parked: int
    handover_ms: Spread | None
    undisturbed_per_second: float
    with_kills: Rate
    outside_handovers: Rate
    outside_restarts: Rate
    reloads: int
    least_ready: int
    reloading: Rate
    poison: str
    poison_deaths: int
    suspects: int

    @property
    def failures(self) -> list[str]:
        found = {"lost": self.lost, "doubled": self.doubled, "parked": self.parked}
        return [f"{count} {what}" for what, count in found.items() if count]


def measure_crashes(
    *, tasks: int, kills: int, procs: int, dsn: str | None, say: Callable[[str], None]
) -> CrashesReport:
    """Four bursts: undisturbed, with kills, with reloads, and with one poison among 10,000. Raises `RunFailed`."""
    with open_server(dsn) as server:
        setting = setting_of(server)
        quiet = burst(server, tasks, procs, Watching())
        base = outside(quiet.commits, [])
        say(f"undisturbed          {base.per_second:,.0f} tasks/s")
        stormy = burst(server, tasks, procs, killing := Killing(tasks, kills))
        handovers, restarts = killing.spans()
        disturbed = [one for one in stormy.commits if one[0] <= max(since for since, _ in restarts)]
        say(f"{len(handovers)} kills            {outside(stormy.commits, []).per_second:,.0f} tasks/s")
        rolling = burst(server, tasks, procs, reloading := Reloading(tasks, procs))
        say(f"{len(reloading.spans)} reloads            {outside(rolling.commits, []).per_second:,.0f} tasks/s")
        poison = burst(server, _POISON_AMONG, procs, poisoned := Watching(), poisons=1, code=1)
        say(f"poison               {poison.errors}")
        bursts = (quiet, stormy, rolling, poison)
        return CrashesReport(
            bench="crashes",
            setting=setting,
            tasks=tasks,
            procs=procs,
            kills=len(handovers),
            lost=sum(one.lost for one in bursts),
            doubled=sum(one.doubled for one in bursts),
            parked=sum(len(one.errors) for one in bursts) - 1,
            handover_ms=spread([1000 * (until - since) for since, until in handovers]) if handovers else None,
            undisturbed_per_second=base.per_second,
            with_kills=outside(stormy.commits, [], base),
            outside_handovers=outside(disturbed, handovers, base),
            outside_restarts=outside(disturbed, restarts, base),
            reloads=len(reloading.spans),
            least_ready=reloading.least_ready,
            reloading=outside(rolling.commits, _between(reloading.spans), base),
            poison=", ".join(error.partition("\n")[0] for error in poison.errors),
            poison_deaths=poisoned.count("worker.died"),
            suspects=poisoned.count("task.suspect") - poisoned.count("worker.died") + 1,
        )


def crashes_card(report: CrashesReport) -> str:
    def line(what: str, rate: Rate) -> str:
        return f"{what:<25} {rate.per_second:,.0f} tasks/s, {rate.share:.2f} of it, measured over {rate.seconds:.1f} s"

    handover = report.handover_ms
    took = f"median {handover.median:.0f} ms, longest {handover.max:.0f} ms" if handover else "none"
    poison = f"{report.poison_deaths} deaths, {report.suspects} other suspects; parked: {report.poison}"
    return "\n".join(
        [
            *head(report.setting, f"crashes: {report.tasks:,} tasks of 3 steps, {report.procs} processes"),
            f"{'kill -9':<25} {report.kills} of workers at work",
            f"{'lost, doubled, parked':<25} {report.lost}, {report.doubled}, {report.parked}",
            f"{'handover':<25} {took}",
            f"{'undisturbed':<25} {report.undisturbed_per_second:,.0f} tasks/s",
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


def _between(spans: Sequence[Span]) -> list[Span]:
    """What lies around the spans and between them."""
    ends = [0.0, *(end for span in spans for end in span), float("inf")]
    return list(zip(ends[::2], ends[1::2], strict=True))
