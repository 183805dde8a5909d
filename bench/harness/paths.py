"""Directories of this checkout that the benchmarks read and write."""

from __future__ import annotations

from pathlib import Path

__all__ = ["PEERS", "PEERS_HOME", "ROOT"]

ROOT = Path(__file__).parent.parent.parent
PEERS = ROOT / "bench" / "peers"
PEERS_HOME = ROOT / ".bench"
