"""All contenders, by name: pgtask, the floors that Postgres alone sets, and the peers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from bench.contenders.bare import Bare
from bench.contenders.floor import Floor, Minimum
from bench.contenders.peer import find_peers
from bench.contenders.pgtask import Pgtask
from bench.harness.contender import Contender
from bench.harness.paths import PEERS, PEERS_HOME
from bench.harness.server import BenchError

__all__ = ["DEFAULT", "choose_contenders", "find_contenders"]

DEFAULT = "pgtask,floor,minimum,bare"


def find_contenders(peers: Path = PEERS, homes: Path = PEERS_HOME) -> dict[str, Contender]:
    """Return all contenders by name."""
    found: list[Contender] = [Pgtask(), Floor(), Minimum(), Bare(), *find_peers(peers, homes).values()]
    return {contender.name: contender for contender in found}


def choose_contenders(names: str, found: dict[str, Contender]) -> Sequence[Contender]:
    """Return the contenders of a list with commas, or `all`: each once, in that order. Raises `BenchError`."""
    if names == "all":
        return list(found.values())
    wanted = list(dict.fromkeys(name.strip() for name in names.split(",") if name.strip()))
    unknown = [name for name in wanted if name not in found]
    if unknown or not wanted:
        raise BenchError(f"unknown contenders: {', '.join(unknown) or 'none given'}; there are: {', '.join(found)}")
    return [found[name] for name in wanted]
