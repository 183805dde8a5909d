"""Workloads: the tasks of a drain, by name."""

from __future__ import annotations

import base64
import os
from collections.abc import Callable

import msgspec

from bench.workloads.limited import NothingKeyed
from bench.workloads.steps import (
    QUERY,
    WRITE,
    Ask,
    Carry,
    Fifth,
    First,
    Fourth,
    Nothing,
    NothingAtOnce,
    Second,
    Spin,
    Suspend,
    Third,
    Write,
    WriteAtOnce,
    WriteAtOnceWithin,
    WriteWithin,
)
from pgtask import Task

__all__ = ["WORKLOADS", "Workload"]


class Workload(msgspec.Struct, frozen=True):
    """The tasks of a drain.

    `make(number)` is the first step of a task, and `later` are samples of the steps after it. `tasks`: enough for a run
    of some seconds. `setup`: SQL to run in the database before the fill. `is_idle`: its steps do nothing but move on,
    so that the floor can be compared with it. `query`: the statement that each step sends to the database;
    `is_transaction`: in one transaction with its outcome. `app` is the app that has its steps.
    """

    name: str
    make: Callable[[int], Task]
    later: tuple[Task, ...] = ()
    tasks: int = 200_000
    setup: str | None = None
    is_idle: bool = True
    query: str | None = None
    is_transaction: bool = False
    app: str = "bench.workloads.app:app"

    @property
    def steps(self) -> int:
        return 1 + len(self.later)


def _random_text(size: int) -> str:
    """Make a text of `size` letters that does not compress."""
    return base64.b64encode(os.urandom(size * 3 // 4)).decode()


_NUMBER = 100_000  # has as many digits as most numbers of tasks, so that a sample is as large as a real step

WORKLOADS = {
    workload.name: workload
    for workload in (
        Workload("noop", Nothing),
        Workload("noopbatch", NothingAtOnce),
        Workload("noopkeyed", NothingKeyed, tasks=30_000, app="bench.workloads.limited:app"),
        Workload("chain5", First, (Second(_NUMBER), Third(_NUMBER), Fourth(_NUMBER), Fifth(_NUMBER)), tasks=60_000),
        Workload("sleep0", Suspend),
        Workload("cpu1ms", Spin, tasks=10_000, is_idle=False),
        Workload(
            "sqlwrite",
            Write,
            tasks=50_000,
            setup="CREATE TABLE bench_effects (number bigint NOT NULL)",
            is_idle=False,
            query=WRITE,
        ),
        Workload(
            "sqlwritebatch",
            WriteAtOnce,
            setup="CREATE TABLE bench_effects (number bigint NOT NULL)",
            is_idle=False,
        ),
        Workload(
            "transact",
            WriteWithin,
            tasks=20_000,
            setup="CREATE TABLE bench_effects (number bigint NOT NULL)",
            is_idle=False,
            query=WRITE,
            is_transaction=True,
        ),
        Workload(
            "transactbatch",
            WriteAtOnceWithin,
            setup="CREATE TABLE bench_effects (number bigint NOT NULL)",
            is_idle=False,
        ),
        Workload("dbquery", Ask, tasks=50_000, is_idle=False, query=QUERY),
        Workload("payload1k", lambda number: Carry(number, _random_text(1_000)), tasks=100_000),
        Workload("payload100k", lambda number: Carry(number, _random_text(100_000)), tasks=5_000),
    )
}
