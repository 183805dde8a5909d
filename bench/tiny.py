"""Smoke test: every scenario once, as small as possible, on one server. Its numbers mean nothing."""

from __future__ import annotations

import contextlib
import io
import sys
import time
from collections.abc import Callable, Sequence

from bench.harness.server import open_server
from bench.workloads.workload import WORKLOADS

__all__ = ["run_all"]

_DRAIN = ("drain", "--procs=2", "--rounds=1", "--latency-seconds=0")
_TASK_COUNTS = {"noop": 2000, "payload100k": 40}
_DEFAULT_CONTENDERS = ("noop", "chain5")  # workloads whose drain has all contenders that need no installation
_RUNS: Sequence[tuple[str, ...]] = (
    *(
        (
            *(*_DRAIN, f"--workload={name}", f"--tasks={_TASK_COUNTS.get(name, 200)}"),
            *(() if name in _DEFAULT_CONTENDERS else ("--contenders=pgtask,bare",)),
        )
        for name in WORKLOADS
    ),
    ("latency", "--procs=1", "--per-second=100", "--seconds=0.3"),
    ("enqueue", "--tasks=2000", "--rounds=1"),
    ("doors", "--tasks=100", "--rounds=1"),
    ("producers", "--connections=2", "--seconds=0.2", "--rounds=1"),
    ("idle", "--procs=1", "--settle=0.5", "--seconds=0.5", "--future=100", "--leased=100", "--sleeping=100"),
    (
        *("depth", "--scenarios=weight,cold", "--procs=1", "--rounds=1", "--shallow=500", "--deep=1000", "--claims=3"),
        *("--future=100", "--parked=100", "--leased=100"),
    ),
    ("dead", "--dead=20000", "--turns=5"),
    ("schedules", "--procs=1", "--schedules=60", "--per-second=100", "--seconds=3"),
    ("procs", "--counts=1,2", "--tasks=500", "--rounds=1"),
    ("share", "--counts=1,2", "--steps=4", "--step-seconds=0.02", "--rounds=1"),
    ("flows", "--runs=100", "--procs=2", "--rounds=1", "--samples=5", "--steps=20"),
    (
        *("crashes", "--tasks=3000", "--kills=2", "--procs=2", "--rounds=1"),
        *("--steps=20", "--step-seconds=1", "--among=300", "--poisons=1"),
    ),
    ("recover", "--tasks=10", "--rounds=1", "--step-seconds=1.5", "--lease-timeout=1"),
)


def run_all(main: Callable[[Sequence[str]], int]) -> int:
    """Run each command line by `main`; print the output of those that fail. Return the exit code."""
    failed = 0
    with open_server(None) as server:
        for run in (*((*run, "--dsn", server.dsn) for run in _RUNS), ("stages", "--tasks=1000", "--rounds=1")):
            output, began = io.StringIO(), time.monotonic()
            with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
                code = main(run)
            name = " ".join(word for word in run if word not in ("--dsn", server.dsn))
            print(f"{time.monotonic() - began:5.1f} s  {'ok    ' if code == 0 else 'FAILED'}  {name}", flush=True)
            if code != 0:
                failed = 1
                print(output.getvalue(), file=sys.stderr)
    return failed
