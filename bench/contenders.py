"""Who can take part: pgtask, what Postgres gives by itself, and the peers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from bench.bare import Bare
from bench.contender import Contender
from bench.floor import Floor, Minimum
from bench.ours import Ours
from bench.peer import HOME, PEERS, find_peers
from bench.server import BenchError

__all__ = ["DEFAULT", "choose", "find_contenders"]

DEFAULT = "pgtask,floor,minimum,bare"


def find_contenders(peers: Path = PEERS, homes: Path = HOME) -> dict[str, Contender]:
    """All, by name."""
    found: list[Contender] = [Ours(), Floor(), Minimum(), Bare(), *find_peers(peers, homes).values()]
    return {contender.name: contender for contender in found}


def choose(names: str, found: dict[str, Contender]) -> Sequence[Contender]:
    """Those that a list with commas names, or `all`; each once, in that order."""
    if names == "all":
        return list(found.values())
    wanted = list(dict.fromkeys(name.strip() for name in names.split(",") if name.strip()))
    unknown = [name for name in wanted if name not in found]
    if unknown or not wanted:
        raise BenchError(f"unknown contenders: {', '.join(unknown) or 'none given'}; there are: {', '.join(found)}")
    return [found[name] for name in wanted]
