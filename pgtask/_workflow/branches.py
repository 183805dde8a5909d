"""The branches of a run: which of them work, which wait, and when the run is suspended.

Invariant: as long as one branch works, the run stays here. When the last one begins to wait, the run as a whole is
suspended until the first of the waits may be over. Beside a branch that works, a branch looks now and then for what
comes from outside (signals, the ends of children): no notification wakes a run that is leased.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from datetime import datetime
from typing import Any, NamedTuple
from uuid import UUID

from pgtask._backoff import Backoff
from pgtask._workflow.steps import is_cancelled
from pgtask.errors import ReplayError, RunStopped

__all__ = ["Branch", "BranchResult", "Branches", "Wait", "misplaced_error"]

POLL_INTERVAL = 1.0  # seconds until a branch that waits for something from outside looks again, while others work,
POLL_PER_CHILD = 0.01  # and so much more for each child, so that waiting for a thousand costs no more than for a few
# Seconds before all branches look again, after a look that found nothing new.
INITIAL_BACKOFF, MAX_BACKOFF = 0.002, 0.25


class Branch:
    """A branch of a workflow, which makes its calls one after the other.

    `place`, `kind` and `name` are those of its last call; `step` is the name of the step that it runs, or None.
    """

    __slots__ = ("_calls", "_errors", "_failures", "_prefix", "kind", "name", "place", "step")

    def __init__(self, prefix: str = "") -> None:
        self._prefix = prefix
        self._calls = 0
        self._errors: Sequence[BaseException] = ()
        self._failures: Sequence[int] = ()
        self.place = self.kind = self.name = ""
        self.step: str | None = None

    def next_place(self) -> str:
        """Go on to the next call and return its place."""
        self._calls += 1
        self.place = f"{self._prefix}{self._calls}"
        if self._errors:
            self._errors = self._failures = ()
        return self.place

    def note_errors(self, errors: Sequence[BaseException], failures: Sequence[int]) -> None:
        """Note that the last call ends with these errors, which follow from the checkpoints of these numbers."""
        self._errors, self._failures = errors, failures

    def failures_behind(self, error: BaseException) -> Sequence[int]:
        """The numbers of the checkpoints that an error which leaves the branch follows from. None once the branch has
        made another call: then they are part of its history."""
        return self._failures if any(one is error for one in self._errors) else ()


class BranchResult(NamedTuple):
    """The result of a branch of a gather, or its error."""

    branch: Branch
    value: Any
    error: BaseException | None


class Wait(NamedTuple):
    """The wait of a branch. `due_at`: the time at which it looks again in any case; `seen_at`: the task's wakeup_at as
    of its last look for a signal."""

    what: str
    due_at: datetime | None = None
    seen_at: datetime | None = None
    children: tuple[UUID, ...] = ()


class Branches:
    """The branches of one run, by the asyncio task that runs each; the current one runs the `root`.

    `suspend` is awaited when no branch works any more. When it returns, all branches look again; its error is raised
    in each of them.
    """

    def __init__(self, suspend: Callable[[list[Wait]], Awaitable[None]], now: Callable[[], datetime]) -> None:
        self.root = Branch()
        self._suspend = suspend
        self._now = now
        self._loop = asyncio.get_running_loop()  # without it, the look for the current task costs twice as much
        self._by_task: dict[Any, Branch] = {asyncio.current_task(self._loop): self.root}
        self._working = 1
        self._is_deciding = False
        self._refused: list[Wait] = []  # the waits of all branches when the run was last not suspended
        self._backoff = Backoff(INITIAL_BACKOFF, MAX_BACKOFF)
        self._waiting: dict[asyncio.Future[None], Wait] = {}

    # --- the tasks

    def current(self) -> Branch | None:
        """The branch that the current task runs; None in a task that the workflow has made by itself."""
        return self._by_task.get(asyncio.current_task(self._loop))

    @property
    def tasks(self) -> Sequence[asyncio.Task[Any]]:
        """The tasks of all branches."""
        return list(self._by_task)

    @property
    def places(self) -> Sequence[str]:
        """The places of the last calls of all branches."""
        return [branch.place for branch in self._by_task.values()]

    def suspended_coroutines(self) -> list[Any]:
        """The coroutines of the branches beside the root."""
        return [task.get_coro() for task, branch in self._by_task.items() if branch is not self.root]

    def cancel_others(self) -> None:
        """Cancel the tasks of all branches but the current one, and the root, which waits for them or asks next."""
        for task, branch in list(self._by_task.items()):
            if branch is not self.root and task is not asyncio.current_task():
                task.cancel()

    async def gather(self, place: str, calls: Sequence[Awaitable[Any]]) -> list[BranchResult]:
        """Run calls in branches of their own, below a place, until all have ended. Cancelling this cancels them."""
        self.begin(len(calls) - 1)  # the current branch works in them
        left = [len(calls)]
        branches = [Branch(f"{place}.{at}.") for at in range(len(calls))]
        tasks = [asyncio.create_task(self._run_branch(*one, left)) for one in zip(branches, calls, strict=True)]
        try:
            await asyncio.wait(tasks)
        except asyncio.CancelledError:
            for task in tasks:
                task.cancel()
            await asyncio.wait(tasks)
            raise
        ended = zip(branches, tasks, strict=True)
        return [
            BranchResult(branch, None, asyncio.CancelledError()) if task.cancelled() else task.result()
            for branch, task in ended
        ]

    async def _run_branch(self, branch: Branch, call: Awaitable[Any], left: list[int]) -> BranchResult:
        """Run a branch. Its error is a value: the loop would end with the SystemExit of a task."""
        task = asyncio.current_task()
        self._by_task[task] = branch
        try:
            return BranchResult(branch, await call, None)
        except asyncio.CancelledError as error:
            if is_cancelled():
                raise
            return BranchResult(branch, None, error)
        except BaseException as error:
            return BranchResult(branch, None, error)
        finally:
            del self._by_task[task]
            left[0] -= 1
            if left[0]:
                await self.end()

    # --- work and waits

    def begin(self, branches: int) -> None:
        """Count more branches that work."""
        self._working += branches

    async def end(self) -> None:
        """Count a branch that has ended."""
        self._working -= 1
        await self._decide()

    async def wait(self, wait: Wait) -> None:
        """Wait in this branch until it should look again. Raises the error of `suspend`, or that of `stop`."""
        loop = asyncio.get_running_loop()
        over: asyncio.Future[None] = loop.create_future()
        self._waiting[over] = wait
        self._working -= 1
        timer = None
        try:
            await self._decide()
            if not over.done() and (seconds := self._seconds_until_look(wait)) is not None:
                timer = loop.call_later(seconds, self._let_look, over)
            await over
        finally:
            if self._waiting.pop(over, None) is not None:  # cancelled
                self._working += 1
            if timer is not None:
                timer.cancel()

    def _seconds_until_look(self, wait: Wait) -> float | None:
        """The seconds until a branch looks again while others work; None: not before they wait too."""
        poll = None
        if wait.seen_at is not None or wait.children:
            poll = POLL_INTERVAL + POLL_PER_CHILD * len(wait.children)
        if wait.due_at is None:
            return poll
        seconds = max(0.0, (wait.due_at - self._now()).total_seconds())
        return seconds if poll is None else min(poll, seconds)

    def _let_look(self, over: asyncio.Future[None]) -> None:
        """Let a branch look again; not while the run is being suspended."""
        if not self._is_deciding and self._waiting.pop(over, None) is not None:
            self._working += 1
            over.set_result(None)

    def stop(self, error: BaseException) -> None:
        """Raise an error in all branches that wait."""
        while self._waiting:
            over, _ = self._waiting.popitem()
            self._working += 1
            if not over.done():
                over.set_exception(error)

    def close(self) -> None:
        """Suspend nothing from now on: the run has ended."""
        self._suspend = _refuse_to_suspend

    async def _decide(self) -> None:
        """Suspend the run if all its branches wait."""
        if self._working or not self._waiting or self._is_deciding:
            return
        self._is_deciding = True
        try:
            await self._back_off()
            if not self._working:
                await self._suspend(list(self._waiting.values()))
        except BaseException as error:
            self.stop(error)
            return
        finally:
            self._is_deciding = False
        for over in list(self._waiting):
            self._let_look(over)

    async def _back_off(self) -> None:
        """Pause before the run is suspended for the same waits again.

        The journal refuses to suspend a run for something that the run then finds. Where the two do not agree (another
        program has changed the rows), looking again at once would be a storm."""
        waits = [wait._replace(seen_at=None) for wait in self._waiting.values()]
        if waits == self._refused:
            await asyncio.sleep(self._backoff.next())
        else:
            self._refused = waits
            self._backoff.reset()


async def _refuse_to_suspend(_: list[Wait]) -> None:
    """Stand for the suspension of a run that has ended."""
    raise RunStopped("the run has ended")


def misplaced_error(what: str, branch: Branch | None) -> ReplayError:
    """Make the error for a call of the context in a place where it is not allowed."""
    if branch is None:
        return ReplayError(
            f"{what} is awaited in a task of its own, in which its place is not known; use ctx.gather(...)"
        )
    return ReplayError(
        f"{what} is asked for inside step {branch.step!r}; a step may not use ctx: call plain functions there, "
        "or ask for it in the workflow"
    )
