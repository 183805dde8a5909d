"""Durable peers beside our workflows: their five-step runs (`chain5`), in the same rounds, on the same server.

Invariants: those of `bench.harness.rounds`; a ratio compares two runs of one round.
"""

from __future__ import annotations

from pathlib import Path

import msgspec

from bench.contenders.peer import find_peers
from bench.contenders.registry import choose_contenders
from bench.harness.progress import Progress
from bench.harness.rounds import Entrant, prepare_contenders, run_contender
from bench.harness.server import Server
from bench.harness.spread import Spread, spread
from bench.harness.summary import ContenderRun
from bench.workloads.workload import WORKLOADS

__all__ = ["DurablePeers", "PeerSummary"]

_WORKLOAD = WORKLOADS["chain5"]


class PeerSummary(msgspec.Struct, frozen=True):
    """A peer in all rounds. `ratio`: our runs per second over its own, for each round. Both are None if every round has
    failed."""

    entrant: Entrant
    runs_per_second: Spread | None
    ratio: Spread | None
    failures: list[str]


class DurablePeers:
    """Peers of a list of names with commas, which may be empty. `skipped`: the reason of each that cannot take part."""

    def __init__(self, names: str, runs: int, procs: int, *, peers: Path, homes: Path, progress: Progress) -> None:
        chosen = choose_contenders(names, {**find_peers(peers, homes)}) if names else []
        self._contenders, self._entrants, self.skipped = prepare_contenders(chosen, runs, procs, _WORKLOAD, progress)
        self._runs: list[ContenderRun] = []
        self._ours: dict[int, float] = {}
        self._progress = progress

    def measure(self, server: Server, number: int, ours: float) -> None:
        """Run each peer in this round. `ours`: the runs per second of pgtask in the same round."""
        self._ours[number] = ours
        for contender in self._contenders:
            entrant = self._entrants[contender.name]
            self._progress(f"round {number}: {entrant.tasks:,} runs by {contender.name}")
            run, _ = run_contender(
                server,
                contender,
                _WORKLOAD,
                tasks=entrant.tasks,
                procs=entrant.procs,
                batch=entrant.tasks,
                number=number,
            )
            self._runs.append(run)

    def summarise(self) -> dict[str, PeerSummary]:
        return {name: self._summarise_peer(name, entrant) for name, entrant in self._entrants.items()}

    def _summarise_peer(self, name: str, entrant: Entrant) -> PeerSummary:
        mine = [run for run in self._runs if run.contender == name]
        good = [run for run in mine if not run.failed]
        return PeerSummary(
            entrant=entrant,
            runs_per_second=spread([run.tasks_per_second for run in good]) if good else None,
            ratio=spread([self._ours[run.round] / run.tasks_per_second for run in good]) if good else None,
            failures=[f"round {run.round}, {name}: {run.failed}" for run in mine if run.failed],
        )
