"""One run of a workflow in a worker, as its journal and its branches see it: where it is, what it has recorded, when it
is let go.

Invariants: nothing is asked or recorded in a run that was stopped: `RunStopped` is raised instead. `verdict` says what
has become of it, and is set once.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable
from typing import Any, NoReturn
from uuid import UUID

from pgtask._fastpath import Again, Lease, Written
from pgtask._worker.asked import Asked, noted
from pgtask._worker.calls import Calls
from pgtask._worker.entries import Checkpoint, History, Journalled, Pause
from pgtask._worker.replay import Branch, Replay
from pgtask._worker.waits import Wait, Waits
from pgtask.errors import ReplayError, RunStopped
from pgtask.task import Context
from pgtask.workflow import Workflow, check_name
from pgtask.workflow_context import WorkflowContext

__all__ = ["Recording"]


class Recording(WorkflowContext):
    """The part of a run that knows its journal and its branches."""

    def __init__(
        self,
        flow: Workflow[Any, Any],
        lease: Lease,
        context: Context,
        history: History,
        *,
        journal: Journalled,
        calls: Calls,
    ) -> None:
        self.run_id = UUID(int=context.task_id.int)
        self.attempt = context.attempt
        self.version = flow.version if history.version is None else history.version
        self.db, self.resources = context.db, context.resources
        self.flow = flow
        self.lease = lease
        self.verdict: Written | Again | Exception | None = None
        """Set when the run was stopped: what to tell the dispatcher, or what to raise there."""
        self.asked = Asked()
        self._journal = journal
        self._calls = calls
        self._replay = Replay(history.checkpoints)
        self._unsaid_version = self.version if history.version is None else None
        self._wakeup_at = history.wakeup_at
        self._waits = Waits(self._let_go, journal.now)
        self._root = Branch()
        self._branches: dict[Any, Branch] = {asyncio.current_task(): self._root}
        self.failed_before = lease.tried
        """Failed tries outside of steps since the run last got a result; those of a step are in its checkpoint."""

    # --- asking and recording

    def _find(self, kind: str, name: str) -> tuple[Branch, Checkpoint | None]:
        """This branch, at its next place, and what is recorded there."""
        self._refuse_if_stopped()
        branch = self._branch(kind, name)
        try:
            check_name(kind, name, ReplayError)
            return branch, self._replay.find(branch.next_place(), kind, name)
        except ReplayError as error:
            self._refuse(error)

    def _branch(self, kind: str, name: str = "") -> Branch:
        """The branch that asks for something."""
        branch = self._branches.get(asyncio.current_task())
        if branch is None or branch.step is not None:
            self._refuse(_misplaced(f"{kind} {name!r}" if name else kind, branch))
        return branch

    def _refuse(self, error: ReplayError) -> NoReturn:
        """Stop the run for an error in its code: an exception that user code may catch would let it go on."""
        self._refuse_if_stopped()
        self._stop(error, str(error))

    def _refuse_if_stopped(self) -> None:
        if self.verdict is not None:
            raise RunStopped("the run is stopped")

    def _begin(self) -> None:
        """Something is about to be done that is not recorded: not if the run is stopped, or its worker leaves."""
        self._refuse_if_stopped()
        if self._calls.is_draining:
            self._stop(Again(0.0, self.failed_before), "its worker leaves")

    def _stop(self, verdict: Written | Again | Exception, why: str) -> NoReturn:
        """Stop the run: in branches that wait now, in the others when they ask for something."""
        self.verdict = verdict
        stopped = RunStopped(f"the run is stopped here: {why}")
        self._waits.stop(stopped)
        raise stopped

    async def _written(self, entry: asyncio.Future[Any]) -> Any:
        """What the journal answers. When the lease is lost the run is stopped, and its other branches are cancelled."""
        try:
            return await entry
        except RunStopped as lost:
            if self.verdict is None:
                self.verdict = Written()
                self._waits.stop(lost)
                for task in self._branches.keys() - {asyncio.current_task()}:
                    task.cancel()
            raise

    def _version(self) -> int | None:
        """The version, for the first entry that tells the journal."""
        version, self._unsaid_version = self._unsaid_version, None
        return version

    async def _note(self, checkpoint: Checkpoint) -> None:
        """Record what gets the run no further: that a step is put off."""
        await self._written(self._journal.record(self.lease, checkpoint, self._version()))

    async def _record(self, checkpoint: Checkpoint) -> None:
        await self._note(checkpoint)
        self.failed_before = 0

    def failures_behind(self, error: Exception) -> list[int]:
        """The numbers of the checkpoints to be forgotten when the run ends with an error that has left the function."""
        return self._root.failures_behind(error)

    def check_end(self) -> None:
        """The function has returned. Raises `ReplayError` for what it did not ask for, or not await."""
        self.asked.check()
        self._replay.check_end()

    # --- branches and waits

    @noted
    async def gather(self, *steps: Awaitable[Any], return_exceptions: bool = False) -> list[Any]:
        branch = self._branch("ctx.gather()")
        place = branch.next_place()
        if not steps:
            return []
        self._waits.begin(len(steps) - 1)  # this one is at work in them
        left = [len(steps)]
        strands = [Branch(f"{place}.{at}.") for at in range(len(steps))]
        tasks = [asyncio.create_task(self._strand(*one, left)) for one in zip(strands, steps, strict=True)]
        try:
            await asyncio.wait(tasks)
        except asyncio.CancelledError:
            for task in tasks:
                task.cancel()
            await asyncio.wait(tasks)
            raise
        finally:
            errors = [None if task.cancelled() else task.exception() for task in tasks if task.done()]
        self._refuse_if_stopped()
        failed = [(strand, error) for strand, error in zip(strands, errors, strict=True) if error is not None]
        failures = [number for strand, error in failed for number in strand.failures_behind(error)]
        branch.fail([error for _, error in failed], failures)
        for _, error in failed:
            if not (return_exceptions and isinstance(error, Exception)):
                raise error
        return [task.result() if error is None else error for task, error in zip(tasks, errors, strict=True)]

    async def _strand(self, branch: Branch, step: Awaitable[Any], left: list[int]) -> Any:
        task = asyncio.current_task()
        self._branches[task] = branch
        try:
            return await step
        finally:
            del self._branches[task]
            left[0] -= 1
            if left[0]:
                await self._waits.end()

    async def _let_go(self, waits: list[Wait]) -> None:
        """All branches wait: let go of the lease, unless something has come meanwhile; then all look again."""
        self._refuse_if_stopped()
        due_at = min((wait.due_at for wait in waits if wait.due_at is not None), default=None)
        groups = [wait.children for wait in waits if wait.children]
        seen_at = min((wait.seen_at for wait in waits if wait.seen_at is not None), default=self._wakeup_at)
        what = ", ".join(dict.fromkeys(wait.what for wait in waits[:10]))
        children = [child for ids in groups for child in ids]
        pause = Pause(seen_at, due_at, self.failed_before, what, len(groups) > 1, children)
        self._wakeup_at = await self._written(self._journal.pause(self.lease, pause))
        if self._wakeup_at is None:
            self._stop(Written(), f"it waits for {what}")


def _misplaced(what: str, branch: Branch | None) -> ReplayError:
    """The error for something that is asked for where it has no place."""
    if branch is None:
        return ReplayError(
            f"{what} is awaited in a task of its own, in which its place is not known; use ctx.gather(...)"
        )
    return ReplayError(
        f"{what} is asked for inside step {branch.step!r}; a step may not use ctx: call plain functions there, "
        "or ask for it in the workflow"
    )
