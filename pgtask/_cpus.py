"""How many CPUs this process may use."""

from __future__ import annotations

import os
from pathlib import Path

__all__ = ["default_procs"]


def default_procs() -> int:
    """The CPUs this process may use: its affinity, and the quota of its cgroup where there is one; at least 1."""
    import psutil

    try:
        usable = len(os.sched_getaffinity(0))
    except AttributeError:  # not Linux
        usable = psutil.cpu_count() or 1
    quota = _cgroup_quota()
    return max(1, usable if quota is None else min(usable, round(quota)))


def _cgroup_quota() -> float | None:
    """CPUs allowed by the cgroup (v2, else v1), or None without a limit."""
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
