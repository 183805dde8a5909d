"""Groups: tasks that belong together, their progress, their results, and the step that is enqueued once at their end.

Invariants: making a group or a handle sends nothing; a wrong value raises `EnqueueError` before anything is sent. What
a group says of itself is what the database says: the handle keeps no counts.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from datetime import datetime, timedelta
from typing import Any, Literal, NamedTuple, Protocol, TypeVar, get_args, overload
from uuid import UUID

import msgspec

from pgtask._copy import Source
from pgtask._placement import KEEP, check_key
from pgtask._postgres.groups import NewGroup
from pgtask._postgres.listing import TaskFilter
from pgtask._postgres.task_changes import Retry
from pgtask._validate import ItemEncoder, place_item
from pgtask.errors import DecodeError, EnqueueError, GroupNotFound
from pgtask.outcome import Enqueue
from pgtask.task import Task
from pgtask.tasks import Tasks, TaskStore

__all__ = [
    "Group",
    "GroupHandle",
    "GroupState",
    "GroupStatus",
    "GroupStore",
    "check_group",
    "check_name",
    "measure",
    "new_group",
    "status_of",
]

T = TypeVar("T")
GroupState = Literal["open", "cancelling", "ended", "cancelled"]
OnParked = Literal["wait", "go on"]

WATCH_INTERVAL = 0.5  # seconds between two looks
WINDOW = 30.0  # seconds over which a watch measures the rate
MIN_WINDOW = 2.0  # less says nothing
PAGE = 5_000  # results that are read at once
_FIRST = UUID(int=0)
_COLUMNS = (
    *("name", "state", "results", "total", "done", "parked", "cancelled"),
    *("started_at", "ended_at", "then_task", "seen_at"),
)


class Group(msgspec.Struct, frozen=True, repr_omit_defaults=True):
    """A group of tasks, to be started by `Client.start`:

        crawl = await client.start(Group("crawl 2026-11-30", results=True, then=Report("2026-11-30")), map(Fetch,
        seeds))

    - `name`: of 1 to 512 characters; no other group in the table has it.
    - `results`: whether to keep what its members return by `Done(value)`.
    - `then`: a step that is enqueued exactly once, when the group ends. With an `Enqueue` you choose its queue and
      priority.
    - `on_parked`: a group ends when none of its members waits or runs. With `"wait"` parked ones hold the end up, until
      you retry or cancel them; with `"go on"` they do not.

    Raises `EnqueueError` for a wrong value.
    """

    name: str
    results: bool = False
    then: Task | Enqueue | None = None
    on_parked: OnParked = "wait"

    def __post_init__(self) -> None:
        check_name(self.name)
        if self.on_parked not in get_args(OnParked):
            raise EnqueueError(f'Group(on_parked={self.on_parked!r:.80}) must be "wait" or "go on"')
        if not isinstance(self.then, Task | Enqueue | None):
            raise EnqueueError(f"Group(then={self.then!r:.80}) must be a step, or an Enqueue of one")
        if isinstance(self.then, Enqueue) and (self.then.after, self.then.at, self.then.key) != (None, None, None):
            raise EnqueueError(
                "Group(then=Enqueue(...)) takes a queue and a priority; the end of the group is its time"
            )


class GroupStatus(msgspec.Struct, frozen=True, kw_only=True):
    """The progress of a group, as of `seen_at`.

    - `state`: `open`; `cancelling`, while its members are being removed; `ended`, or `cancelled` when that is done.
    - `total`: the members, those that its members have added included. `done`: those that have finished. `parked`:
      those that wait for a person. `cancelled`: those that were removed.
    - `rate`: members that were done a second, lately or since the start; `eta`: the time until all are done at that
      rate, None if that is not known, as where only parked members are left.
    - `then_task`: the id of the task that was enqueued at its end.

    `done` never goes back, and all counts are exact at the end. While more than 5,000 members are left, `parked` and
    `cancelled` may lack what people have changed one by one.
    """

    name: str
    state: GroupState
    results: bool
    total: int
    done: int
    parked: int
    cancelled: int
    started_at: datetime
    ended_at: datetime | None
    then_task: UUID | None
    seen_at: datetime
    rate: float = 0.0

    @property
    def left(self) -> int:
        """The members that wait or run."""
        return max(0, self.total - self.done - self.parked - self.cancelled)

    @property
    def has_ended(self) -> bool:
        """Whether the group has ended."""
        return self.ended_at is not None

    @property
    def eta(self) -> timedelta | None:
        """The time until nothing of it waits or runs, at its rate; None if that is not known: too little is done, the
        rest is parked, or it is being cancelled."""
        if self.has_ended:
            return timedelta(0)
        if self.state == "cancelling" or (self.parked and not self.left):
            return None
        if not self.left:
            return timedelta(0)
        return timedelta(seconds=self.left / self.rate) if self.rate > 0 and self.left / self.rate < 1e9 else None


def status_of(row: Any) -> GroupStatus:
    """Return the status of a row of a group, with the rate since its start."""
    return with_rate(GroupStatus(**dict(zip(_COLUMNS, row, strict=True))))


def new_group(group: Group, max_step_bytes: int) -> NewGroup:
    """Return a group as a store starts it. Raises `EnqueueError` for a step that no worker could run."""
    then = None if group.then is None else place_item(None, None, (None, None), KEEP, max_step_bytes, group.then)
    return NewGroup(group.name, group.results, group.on_parked, then)


class Found(NamedTuple):
    """A group in the table."""

    id: int
    results: bool


class GroupStore(Protocol):
    """The groups of a client, in a database or in memory."""

    async def start_group(self, group: NewGroup, source: Source, encode: ItemEncoder, conn: Any) -> int:
        """Insert a group and its members; return how many there are."""

    async def read_groups(self, names: list[str] | None, limit: int) -> list[Any]:
        """Return the rows of the groups with these names, or of the last ones to be started; see `status_of`."""

    async def find_group(self, name: str) -> Found | None:
        """Return a group, or None."""

    async def read_results(self, group: int, after: UUID, limit: int) -> list[tuple[UUID, str]]:
        """Return results behind a task, in the order of the tasks."""

    async def cancel_group(self, name: str, then: bool, conn: Any) -> bool | None:
        """Cancel a group; false if it has ended, None if there is none."""

    async def end_groups(self, names: list[str]) -> None:
        """End those of the groups of which nothing waits or runs."""


class GroupHandle:
    """A group, by its `name`. Holds no connection. Its methods raise `GroupNotFound` if there is no such group."""

    def __init__(self, store: GroupStore, tasks: TaskStore, name: str) -> None:
        self.name = name
        self._store = store
        self._tasks = tasks

    def __repr__(self) -> str:
        return f"<group {self.name}>"

    async def status(self) -> GroupStatus:
        """Return its progress as of now, in a few milliseconds for any number of members. Its rate is that since the
        start."""
        found = await self._store.read_groups([self.name], 1)
        if not found:
            raise _not_found(self.name)
        return status_of(found[0])

    async def watch(self, interval: timedelta = timedelta(seconds=WATCH_INTERVAL)) -> AsyncGenerator[GroupStatus, None]:
        """Yield its progress, at most once in each `interval` and whenever it has changed, until the group has ended.
        The last one says so.

        The rate is that of the last half minute. It ends a group whose last member was removed while no worker runs.
        """
        samples: deque[GroupStatus] = deque()
        last: GroupStatus | None = None
        while True:
            now = await self.status()
            if not now.has_ended and not now.left:
                await self._store.end_groups([self.name])
                now = await self.status()
            now = measure(samples, now)
            if last is None or _differs(last, now):
                yield now
                last = now
            if now.has_ended:
                return
            await asyncio.sleep(interval.total_seconds())

    async def wait(self) -> GroupStatus:
        """Wait until it has ended, and return its last status."""
        return [now async for now in self.watch() if now.has_ended][-1]

    @overload
    def results(self, type: type[T]) -> AsyncIterator[T]: ...
    @overload
    def results(self, type: Any = Any) -> AsyncIterator[Any]: ...
    async def results(self, type: Any = Any) -> AsyncIterator[Any]:
        """Yield what its members have returned by `Done(value)`, decoded as the `type`, in the order in which they were
        enqueued: each once, when the group has ended; before, those that are there.

        It reads some thousand at a time, and holds no transaction, so memory stays constant. Raises `EnqueueError` if
        the group keeps no results, and `DecodeError` for a value that is not of the type.
        """
        async for page in self.pages(type):
            for result in page:
                yield result

    async def pages(self, type: Any = Any) -> AsyncGenerator[list[Any], None]:
        """Yield the same, some thousand at a time."""
        found = await self._find()
        if not found.results:
            raise EnqueueError(f"group {self.name!r} keeps no results: start it with Group(..., results=True)")
        decode = msgspec.json.Decoder(type).decode
        after = _FIRST
        while page := await self._store.read_results(found.id, after, PAGE):
            try:
                results = [decode(value) for _, value in page]
            except msgspec.DecodeError as error:
                wrong = next(task for task, value in page if not _fits(decode, value))
                raise DecodeError(f"the result of task {wrong} in group {self.name!r}: {error}") from error
            yield results
            after = UUID(int=page[-1][0].int)

    def tasks(self, *, parked: bool = False, error: str | None = None) -> Tasks:
        """Choose its members that are in the table, or the parked ones, or those with an error like the pattern, as
        `Client.tasks(group=...)` does."""
        if error is not None and (not isinstance(error, str) or "\0" in error):
            raise EnqueueError(f"tasks(error={error!r:.80}) must be a text without NUL")
        wanted = TaskFilter(group=self.name, error=error)
        if parked or error is not None:
            wanted = msgspec.structs.replace(wanted, states=("parked",))
        return Tasks(self._tasks, wanted)

    async def retry(self, *, error: str | None = None) -> int:
        """Make its parked members due now, or those with an error like the pattern (of SQL LIKE), with all their
        retries. Return how many."""
        await self._find()
        wanted = TaskFilter(states=("parked",), group=self.name, error=_check_error(error))
        return await self._tasks.change_tasks(wanted, Retry())

    async def cancel(self, *, then: bool = True, conn: Any = None) -> bool:
        """Cancel it: no worker starts a member from about a second later on, and those that wait or are parked are
        removed. What runs goes to the end of its step. The group ends when that is done; then the step `then` of the
        group is enqueued, but without it if `then` is false here.

        Returns at once; `wait` waits for the end. False if the group has ended before.
        """
        done = await self._store.cancel_group(self.name, then, conn)
        if done is None:
            raise _not_found(self.name)
        return done

    async def _find(self) -> Found:
        found = await self._store.find_group(self.name)
        if found is None:
            raise _not_found(self.name)
        return found if isinstance(found, Found) else Found(*found)


def check_name(name: object) -> str:
    """Return the name of a group if it can be one."""
    try:
        return check_key(name)
    except EnqueueError:
        raise EnqueueError(
            f"the name of a group, {name!r:.80}, must be a text of 1 to 512 characters without NUL"
        ) from None


def check_group(group: object) -> Group:
    """Return the group that `Client.start` takes."""
    if not isinstance(group, Group):
        raise EnqueueError(
            f"start() takes a Group and then its steps, not {group!r:.80}: write start(Group(name), steps)"
        )
    return group


def with_rate(now: GroupStatus, since: GroupStatus | None = None) -> GroupStatus:
    """Return a status with the rate since another one, or since the start."""
    began, done = (now.started_at, 0) if since is None else (since.seen_at, since.done)
    seconds = ((now.ended_at or now.seen_at) - began).total_seconds()
    return msgspec.structs.replace(now, rate=(now.done - done) / seconds if seconds > 0 else 0.0)


def measure(samples: deque[GroupStatus], now: GroupStatus) -> GroupStatus:
    """Return a status with the rate of the last half minute, as far as there are samples of that."""
    samples.append(now)
    while (now.seen_at - samples[0].seen_at).total_seconds() > WINDOW:
        samples.popleft()
    is_enough = (now.seen_at - samples[0].seen_at).total_seconds() >= MIN_WINDOW
    return with_rate(now, samples[0] if is_enough and not now.has_ended else None)


def _differs(last: GroupStatus, now: GroupStatus) -> bool:
    return (last.state, last.total, last.done, last.parked, last.cancelled) != (
        now.state,
        now.total,
        now.done,
        now.parked,
        now.cancelled,
    )


def _check_error(error: object) -> str | None:
    if error is not None and (not isinstance(error, str) or "\0" in error):
        raise EnqueueError(f"retry(error={error!r:.80}) must be a text without NUL")
    return error


def _fits(decode: Callable[[str], Any], value: str) -> bool:
    try:
        decode(value)
    except msgspec.DecodeError:
        return False
    return True


def _not_found(name: str) -> GroupNotFound:
    return GroupNotFound(f"there is no group {name!r}: pgtask groups lists those there are")
