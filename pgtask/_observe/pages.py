"""The pages of a fleet: a file in memory that its supervisor makes, its workers write and others read.

`read` is the way in for all that shows a fleet: the exporter, which inherits the file, and programs beside it, which
`find` the files of the same user. The layout is in `_fastpath/pages.pyx`.

Invariants: a counter never falls while its supervisor lives, since the page of a dead worker keeps its numbers for the
next one; a page belongs to one living process at most; reading never holds up a writer.
"""

from __future__ import annotations

import contextlib
import mmap
import operator
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator
from functools import reduce
from pathlib import Path
from typing import Any

import msgspec

from pgtask._fastpath import CounterPage, bucket_bounds, bytes_in_use, read_page

__all__ = [
    "BOUNDS",
    "Histogram",
    "PageWriter",
    "Pages",
    "Snapshot",
    "StepCounts",
    "StepEdge",
    "WorkerState",
    "find",
    "read",
]

BOUNDS = bucket_bounds()
"""The upper bounds of the buckets of a `Histogram` in seconds, but for the last one, which has none."""

_NAME = "pgtask-pages"
_HEAD = 4096


class Histogram(msgspec.Struct, frozen=True):
    """Observed seconds: their sum, and how many lie in each bucket of `BOUNDS`."""

    sum: float = 0.0
    buckets: tuple[int, ...] = (0,) * (len(BOUNDS) + 1)

    @property
    def count(self) -> int:
        return sum(self.buckets)

    def __add__(self, other: Histogram) -> Histogram:
        return self._combine(operator.add, other)

    def __sub__(self, earlier: Histogram) -> Histogram:
        return self._combine(operator.sub, earlier)

    def _combine(self, combine: Any, other: Histogram) -> Histogram:
        buckets = tuple(map(combine, self.buckets, other.buckets))
        return Histogram(combine(self.sum, other.sum), buckets)

    def quantile(self, share: float) -> float | None:
        """Return the seconds that this share of the observations does not exceed, interpolated within a bucket; None if
        there are none. Above the last bound it is that bound."""
        wanted, below = share * self.count, 0
        if not self.count:
            return None
        for at, count in enumerate(self.buckets[:-1]):
            if count and below + count >= wanted:
                start = BOUNDS[at - 1] if at else 0.0
                return start + (BOUNDS[at] - start) * max(0.0, wanted - below) / count
            below += count
        return BOUNDS[-1]


class StepCounts(msgspec.Struct, frozen=True, kw_only=True):
    """The counters of a step; of rows that no step could be decoded from, if `task` and `step` are empty.

    `run`: how long its runs took, repeated ones included. `wait`: how long its tasks waited from when they were due to
    their start. The others count outcomes that are in the database: tasks `done`; tries that went on to the `next`
    step, or failed and will be `retried`; tasks that were `parked`; that had `expired`; tries `postponed` through no
    fault of the step. `lost`: leases that were lost, and outcomes that could not be written.
    """

    task: str
    step: str
    run: Histogram = Histogram()
    wait: Histogram = Histogram()
    done: int = 0
    next: int = 0
    retried: int = 0
    parked: int = 0
    expired: int = 0
    postponed: int = 0
    lost: int = 0

    def __add__(self, other: StepCounts) -> StepCounts:
        values = {name: getattr(self, name) + getattr(other, name) for name in _COUNTED}
        return StepCounts(task=self.task, step=self.step, **values)


_COUNTED = StepCounts.__struct_fields__[2:]


class StepEdge(msgspec.Struct, frozen=True, kw_only=True):
    """How many tasks have gone on from a step to the `next` one, in the database."""

    task: str
    step: str
    next: str
    count: int


class WorkerState(msgspec.Struct, frozen=True, kw_only=True):
    """A worker that lives. `started` and `heard` are monotonic seconds: its start, and its last sign of life.

    `holder` is the first half of its tokens. It has `leases`, of which `executing` steps are suspended or in a thread,
    and `waiting` have not started; `unwritten` outcomes are not in the database yet. `lag` and `steps` include what
    earlier processes have counted in its page.
    """

    number: int
    pid: int
    holder: str = ""
    started: float
    heard: float
    leases: int
    executing: int
    waiting: int
    unwritten: int
    is_ready: bool
    is_connected: bool
    is_listening: bool
    is_renewing: bool
    lag: Histogram = Histogram()
    steps: tuple[StepCounts, ...]


class Snapshot(msgspec.Struct, frozen=True, kw_only=True):
    """What a fleet has counted since its supervisor began, dead workers included, and its workers that live.

    `started` and `heard`: monotonic seconds of the start of the supervisor, and of the last turn of its loop. `lag`: by
    how much the loops of workers were late, as sampled twice a second. `busy`: seconds for which steps had them.
    """

    pid: int
    wanted: int
    started: float
    heard: float
    is_stopping: bool
    workers: tuple[WorkerState, ...]
    steps: tuple[StepCounts, ...]
    edges: tuple[StepEdge, ...] = ()
    claims: int
    claimed: int
    flushes: int
    flushed: int
    busy: float
    lag: Histogram


class PageWriter(msgspec.Struct, frozen=True):
    """A page that a worker of this supervisor may write, and its place in the file."""

    index: int
    page: CounterPage


class Pages:
    """The file of one supervisor. Make it before the fork; `fd` is its descriptor."""

    def __init__(self, wanted: int) -> None:
        self.fd = _make_file()
        self._free: list[PageWriter] = []
        self._count = 1
        self._own = self._map(0)
        self._own.begin(os.getpid(), wanted, 0.0)

    def hear(self, *, is_stopping: bool) -> None:
        """Note that the supervisor makes progress."""
        self._own.hear(is_stopping=is_stopping)

    def take(self) -> PageWriter:
        """Take a page for a process: the one that was given back last, or a new one."""
        if self._free:
            return self._free.pop()
        self._count += 1
        return PageWriter(self._count - 1, self._map(self._count - 1))

    def give_back(self, writer: PageWriter) -> None:
        """Give a page back whose process has ended. Its counters stay."""
        writer.page.end()
        self._free.append(writer)

    def _map(self, index: int) -> CounterPage:
        os.ftruncate(self.fd, (index + 1) * CounterPage.size)
        return CounterPage(mmap.mmap(self.fd, CounterPage.size, offset=index * CounterPage.size))


def find(looks_at: Callable[[int], bool] = lambda pid: True) -> Iterator[Path]:
    """Yield the files of all supervisors of this user on this host. Linux only; none elsewhere. A
    caller that searches often may leave out processes."""
    with contextlib.suppress(OSError):
        for name in os.listdir("/proc"):
            if name.isdecimal() and looks_at(int(name)):
                yield from _files_of(Path("/proc", name))


def _files_of(process: Path) -> Iterator[Path]:
    """Yield the file that this process has made: those of its children are the same."""
    with contextlib.suppress(OSError):
        for name in os.listdir(process / "fd"):
            link = f"{process}/fd/{name}"
            is_named = os.readlink(link).startswith(f"/memfd:{_NAME}")
            if is_named and os.stat(link).st_uid == os.geteuid() and _owner(link) == int(process.name):
                yield Path(link)
                return


def _owner(path: str) -> int | None:
    file = os.open(path, os.O_RDONLY)
    try:
        found = read_page(os.pread(file, _HEAD, 0))
    finally:
        os.close(file)
    return None if found is None else found[0]["pid"]


def read(file: int | Path) -> Snapshot:
    """Read the pages of a fleet, by the descriptor of the file or by what `find` has found.

    Raises `OSError` if its supervisor is gone, and `ValueError` for a file of another version of pgtask.
    """
    if isinstance(file, Path):
        descriptor = os.open(file, os.O_RDONLY)
        try:
            return read(descriptor)
        finally:
            os.close(descriptor)
    own, *pages = [_read_page(file, index) for index in range(os.fstat(file).st_size // CounterPage.size)]
    if own is None:
        raise ValueError("the counters are of another version of pgtask: restart the supervisor")
    begun = [page for page in pages if page is not None]
    heads = [head for head, _, _ in begun]
    rows = [_step_counts(row) for _, found, _ in begun for row in found]
    return Snapshot(
        **{name: own[0][name] for name in ("pid", "started", "heard", "is_stopping")},
        wanted=own[0]["number"],
        workers=tuple(_worker_state(*page[:2]) for page in begun if page[0]["pid"]),
        steps=tuple(_sum_up(rows)),
        edges=tuple(_sum_up_edges(edge for _, _, found in begun for edge in found)),
        **{name: sum(head[name] for head in heads) for name in ("claims", "claimed", "flushes", "flushed", "busy")},
        lag=reduce(operator.add, (_histogram(head["lag"]) for head in heads), Histogram()),
    )


def _read_page(file: int, index: int) -> tuple[dict[str, Any], list[dict[str, Any]], list[dict[str, Any]]] | None:
    start = index * CounterPage.size
    head = os.pread(file, _HEAD, start)
    return read_page(os.pread(file, bytes_in_use(head), start))


def _histogram(fields: dict[str, Any]) -> Histogram:
    return Histogram(fields["sum"], tuple(fields["buckets"]))


def _step_counts(row: dict[str, Any]) -> StepCounts:
    return StepCounts(**{**row, "run": _histogram(row["run"]), "wait": _histogram(row["wait"])})


def _worker_state(head: dict[str, Any], rows: list[dict[str, Any]]) -> WorkerState:
    fields = {name: head[name] for name in WorkerState.__struct_fields__ if name not in ("lag", "steps")}
    return WorkerState(**fields, lag=_histogram(head["lag"]), steps=tuple(_sum_up(map(_step_counts, rows))))


def _sum_up(rows: Iterable[StepCounts]) -> list[StepCounts]:
    """Add up the rows of each step; leave out the one for what has no step while it is empty."""
    sums: dict[tuple[str, str], StepCounts] = {}
    for row in rows:
        name = row.task, row.step
        sums[name] = sums[name] + row if name in sums else row
    if (nothing := sums.get(("", ""))) is not None and nothing == StepCounts(task="", step=""):
        del sums["", ""]
    return [sums[name] for name in sorted(sums)]


def _sum_up_edges(edges: Iterable[dict[str, Any]]) -> list[StepEdge]:
    sums: dict[tuple[str, str, str], int] = {}
    for edge in edges:
        name = edge["task"], edge["step"], edge["next"]
        sums[name] = sums.get(name, 0) + edge["count"]
    return [
        StepEdge(task=task, step=step, next=then, count=sums[task, step, then]) for task, step, then in sorted(sums)
    ]


def _make_file() -> int:
    if hasattr(os, "memfd_create"):
        return os.memfd_create(_NAME)
    with tempfile.TemporaryFile() as file:
        return os.dup(file.fileno())
