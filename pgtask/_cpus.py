"""The CPUs that this process may use."""

from __future__ import annotations

import os
from pathlib import Path

__all__ = ["allowed_cpus", "default_procs"]


def allowed_cpus() -> list[int]:
    """Return the numbers of the CPUs in the affinity of this process; empty where the platform has no affinity."""
    try:
        return sorted(os.sched_getaffinity(0))
    except AttributeError:  # not Linux
        return []


def default_procs() -> int:
    """Return the number of CPUs that this process may use, by its affinity and the quota of its cgroup; at least 1."""
    import psutil

    usable = len(allowed_cpus()) or psutil.cpu_count() or 1
    quota = _cgroup_quota()
    return max(1, usable if quota is None else min(usable, round(quota)))


def _cgroup_quota() -> float | None:
    """Return the CPUs that the cgroup allows (v2, else v1); None without a limit."""
    try:
        limit, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
    except (OSError, ValueError):
        try:
            limit = Path("/sys/fs/cgroup/cpu/cpu.cfs_quota_us").read_text().strip()
            period = Path("/sys/fs/cgroup/cpu/cpu.cfs_period_us").read_text().strip()
        except OSError:
            return None
    if limit in ("max", "-1"):
        return None
    return int(limit) / int(period)
