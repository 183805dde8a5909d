"""Durable peers beside our workflows: their five-step runs (`chain5`), in the same rounds, on the same server.

Invariants: as of the drain; a ratio is between two runs of one round.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import msgspec

from bench.contenders import choose
from bench.drain import Entrant, prepare, run_once
from bench.peer import find_peers
from bench.server import Server
from bench.spread import Spread, spread
from bench.summary import Run
from bench.workloads import WORKLOADS

__all__ = ["Durable", "DurablePeers"]

_WORKLOAD = WORKLOADS["chain5"]


class Durable(msgspec.Struct, frozen=True):
    """A peer in all rounds. `ratio`: our runs a second over its own; None if no round was good."""

    entrant: Entrant
    runs_per_second: Spread | None
    ratio: Spread | None
    failures: list[str]


class DurablePeers:
    """Those of a list of names (empty: none) that can take part; `skipped` says why others cannot."""

    def __init__(
        self, names: str, runs: int, procs: int, *, peers: Path, homes: Path, say: Callable[[str], None]
    ) -> None:
        chosen = choose(names, {**find_peers(peers, homes)}) if names else []
        self._contenders, self._entrants, self.skipped = prepare(chosen, runs, procs, _WORKLOAD, say)
        self._runs: list[Run] = []
        self._ours: dict[int, float] = {}
        self._say = say

    def measure(self, server: Server, number: int, ours: float) -> None:
        """A round, in which we have made so many runs a second."""
        self._ours[number] = ours
        for contender in self._contenders:
            entrant = self._entrants[contender.name]
            self._say(f"round {number}: {entrant.tasks:,} runs by {contender.name}")
            run, _ = run_once(
                server,
                contender,
                _WORKLOAD,
                tasks=entrant.tasks,
                procs=entrant.procs,
                batch=entrant.tasks,
                number=number,
            )
            self._runs.append(run)

    def report(self) -> dict[str, Durable]:
        return {name: self._durable(name, entrant) for name, entrant in self._entrants.items()}

    def _durable(self, name: str, entrant: Entrant) -> Durable:
        mine = [run for run in self._runs if run.contender == name]
        good = [run for run in mine if not run.failed]
        return Durable(
            entrant=entrant,
            runs_per_second=spread([run.tasks_per_second for run in good]) if good else None,
            ratio=spread([self._ours[run.round] / run.tasks_per_second for run in good]) if good else None,
            failures=[f"round {run.round}, {name}: {run.failed}" for run in mine if run.failed],
        )
