"""The context of one run: answers the calls of its workflow from the history, or does what they ask for and records it.

Invariants: nothing that the run does here begins before all that its function has seen is durable, and a replay sees
the values of the first run. `outcome` says what has become of a stopped run, and is set once. After that each call
raises `RunStopped`, and nothing begins. A call that the workflow has cut off by itself stops the run at the next call.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Awaitable, Coroutine, Iterable, Sequence
from datetime import datetime, timedelta
from typing import Any, NoReturn, TypeVar
from uuid import UUID, uuid4

import msgspec

from pgtask._current import current_checkpoint
from pgtask._delays import check_delay
from pgtask._error_text import describe
from pgtask._fastpath import Handled, Requeue, TaskLease
from pgtask._json_types import codec_of
from pgtask._retry import seconds_before_retry, throttled_seconds
from pgtask._traces import trace_to_write
from pgtask._workflow.branches import Branch, Branches, Wait, misplaced_error
from pgtask._workflow.children import ChildIds, ChildRun, child_rows, decode_results, encode_results
from pgtask._workflow.entries import (
    MAX_CHILDREN,
    CollectResults,
    JournalEntry,
    SpawnChildren,
    SpawnTraced,
    Suspend,
    TakeSignal,
)
from pgtask._workflow.history import RunHistory
from pgtask._workflow.journal import Journal
from pgtask._workflow.steps import StepFunction, StepRunner, inspect_step, is_cancelled
from pgtask._workflow.timeouts import cut_off_error, find_timeout, forgotten_timeout_error
from pgtask._workflow.unawaited import UnawaitedCalls, tracked
from pgtask._workflow.uncommitted import Uncommitted
from pgtask._workflow.values import Checkpoint, History
from pgtask.errors import (
    DataRefused,
    DecodeError,
    OutcomeError,
    PgtaskError,
    ReplayError,
    RunStopped,
    SignalTimeout,
    StepFailed,
)
from pgtask.policy import Policy
from pgtask.task import Context
from pgtask.workflow import Permanent, Workflow, check_name
from pgtask.workflow_context import Child, WorkflowContext

__all__ = ["RunContext"]

AnswerT = TypeVar("AnswerT")


class RunContext(WorkflowContext):
    """The context of one run, for as long as it is driven here under one lease."""

    def __init__(
        self,
        flow: Workflow[Any, Any],
        lease: TaskLease,
        context: Context,
        history: History,
        *,
        journal: Journal,
        runner: StepRunner,
    ) -> None:
        # More failed tries than the policy allows: the run was revived, and has all its tries again.
        failed_before = lease.tried if lease.tried <= flow.policy.retry_limit else 0
        self.history = RunHistory(history, newest=flow.version, failed_before=failed_before)
        self.run_id = UUID(int=context.task_id.int)
        self.attempt = context.attempt
        self.version = self.history.version
        self.db, self.resources = context.db, context.resources
        self._context = context
        self.flow = flow
        self.lease = lease
        self.outcome: Handled | Requeue | Exception | None = None
        """Set when the run was stopped: the answer for the dispatcher, or the error to raise there."""
        self.function: Coroutine[Any, Any, Any] | None = None
        """The call of the workflow's function, for as long as it lasts."""
        self.unawaited = UnawaitedCalls()
        self._cut_off: ReplayError | None = None
        self._journal = journal
        self._runner = runner
        self.uncommitted = Uncommitted(
            lease,
            self.history,
            journal=journal,
            runner=runner,
            refuse=self._note_refusal,
            cut_off=self._note_cut_off,
        )
        self._wakeup_at = history.wakeup_at
        self._branches = Branches(self._suspend, journal.now)

    @property
    def client(self) -> Any:
        return self._context.client

    # --- steps

    @tracked
    async def step(  # type: ignore[override]  # the overloads are for users
        self, name: str, function: Any, /, *args: Any, policy: Policy | None = None
    ) -> Any:
        branch, found = self._look_up("step", name)
        facts = inspect_step(name, function)
        if found is None or found.is_postponed:
            return await self._run_step(branch, found, function, args, policy or self.flow.policy, facts)
        if found.error is not None:
            raise _fail_branch(branch, StepFailed(name, found.error, found.tried), found)
        assert found.result is not None
        return facts.codec.decode(found.result)

    async def _run_step(
        self, branch: Branch, found: Checkpoint | None, function: Any, args: Any, policy: Policy, facts: StepFunction
    ) -> Any:
        """Try a step until it has a result, record that, and return the value that a replay will see. Raises
        `StepFailed`."""
        name = branch.name
        while True:
            if found is not None:
                await self._wait_until(found, f"try {found.tried + 1} of step {name}")
            await self._begin()
            began = time.monotonic()
            branch.step = name  # in which this branch may ask for nothing else
            current_checkpoint.set(name)
            try:
                value, error = await self._runner.attempt(name, function, args, policy, facts.is_async)
            except GeneratorExit:  # the call of the context was closed
                self._note_cut_off(branch)
                raise
            finally:
                branch.step = None
                current_checkpoint.set("")
            if error is None:
                try:
                    result, value = self._runner.encode_result(f"step {name}", facts.codec, value)
                    break
                except Permanent as wrong:
                    error = wrong
            before = found or Checkpoint(0, branch.place, "step", name)
            found = self._record_failure(branch, before, self._check_step_error(branch, error), policy, began)
        seconds = time.monotonic() - began
        if found is None:
            done = self.history.number(branch.place, "step", name, result, seconds=seconds)
        else:
            done = found._replace(result=result, error=None, seconds=seconds)
        self.uncommitted.add(done)
        return value

    def _check_step_error(self, branch: Branch, error: BaseException) -> BaseException:
        """Return the error of a step as that of its try. Raises an error that ends the run here: a cancellation from
        outside, and `RunStopped`."""
        if isinstance(error, asyncio.CancelledError):
            if is_cancelled():
                self._note_cut_off(branch)
                raise error
            inside = OutcomeError(f"step {branch.name} was cancelled from within: it raised CancelledError")
            inside.__cause__ = error
            return inside
        if isinstance(error, RunStopped) and self.outcome is not None:
            raise error
        return error

    def _record_failure(
        self, branch: Branch, before: Checkpoint, error: BaseException, policy: Policy, began: float
    ) -> Checkpoint:
        """Record that a step is put off; or that it has failed for good, and raise `StepFailed`."""
        self._runner.end_if_copy(error)
        pause = throttled_seconds(error)
        if pause is None and isinstance(error, Exception) and self._runner.is_interruption(error):
            self._stop(error, "the database became unavailable during a step")
        tried = before.tried + (pause is None)
        text, seconds = describe(error), time.monotonic() - began
        numbered = before if before.number else self.history.number(before.place, "step", before.name)
        failed = numbered._replace(error=text, due_at=None, tried=tried, seconds=seconds)
        if pause is not None:
            self._runner.report_throttled(self.lease, error, pause, checkpoint=failed.name)
            return self._put_off(failed, pause)
        delay = None if isinstance(error, StepFailed) else seconds_before_retry(policy, error, tried)
        if delay is None:
            self.uncommitted.add(failed)
            self._runner.report_failure(self.lease, error, None, tried, checkpoint=failed.name)
            raise _fail_branch(branch, StepFailed(failed.name, text, tried), failed) from error
        self._runner.report_failure(self.lease, error, delay, tried, checkpoint=failed.name)
        return self._put_off(failed, delay)

    def _put_off(self, failed: Checkpoint, delay: float) -> Checkpoint:
        """Record that a step is tried again after `delay` seconds."""
        put_off = failed._replace(due_at=self._journal.now() + timedelta(seconds=delay))
        self.uncommitted.add(put_off)
        return put_off

    def encode_output(self, output: Any) -> str:
        """Encode the output of the workflow as JSON. Raises `Permanent`."""
        return self._runner.encode_result(f"workflow {self.flow.name}", codec_of(self.flow.types[1]), output)[0]

    # --- waits

    @tracked
    async def sleep(self, name: str, duration: timedelta) -> None:
        if not isinstance(duration, timedelta):
            self._stop_for_error(ReplayError(f"sleep {name!r} takes a timedelta, not {duration!r:.80}"))
        branch, found = self._look_up("sleep", name)
        if found is None:
            self._check_duration(f"sleep {name!r}: ", duration)
            await self._begin()
            due_at = self._journal.now() + duration
            found = self.history.number(branch.place, "sleep", name, due_at=due_at)
            self.uncommitted.add(found)
        await self._wait_until(found, f"sleep {name}")

    def _check_duration(self, what: str, duration: timedelta) -> None:
        try:
            check_delay(duration, what + "{!r} must be")
        except ValueError as error:
            self._stop_for_error(ReplayError(str(error)))

    async def _wait_until(self, checkpoint: Checkpoint, what: str) -> None:
        """Wait until a checkpoint is due."""
        assert checkpoint.due_at is not None
        while self._journal.now() < checkpoint.due_at:
            await self._wait(Wait(what, checkpoint.due_at))

    @tracked
    async def wait_for_signal(self, name: str, type: Any = Any, *, timeout: timedelta | None = None) -> Any:
        codec = codec_of(type)
        branch, found = self._look_up("signal", name)
        if found is None:
            if timeout is not None:
                self._check_duration(f"the wait for signal {name!r}: timeout=", timeout)
            due_at = None if timeout is None else self._journal.now() + timeout
            found = self.history.number(branch.place, "signal", name, due_at=due_at)
        if not found.is_complete:
            found = await self._take_signal(found)
        if found.result is None:
            raise _fail_branch(branch, SignalTimeout(f"no signal {name} has come in time"), found)
        try:
            return codec.decode(found.result)
        except msgspec.DecodeError as wrong:
            raise _fail_branch(branch, DecodeError(f"signal {name} cannot be read: {wrong}"), found) from None

    async def _take_signal(self, wanted: Checkpoint) -> Checkpoint:
        """Wait for a signal or for the end of its time, and return the checkpoint that is recorded then."""
        while True:
            await self._begin()
            taken = await self._submit(TakeSignal(self.lease, wanted, self.history.take_version()))
            if taken.is_over:
                self.history.failed_before = 0
                return wanted._replace(result=taken.result, error=taken.error)
            await self._wait(Wait(f"signal {wanted.name}", taken.due_at, taken.wakeup_at))

    # --- children

    @tracked
    async def spawn(
        self,
        name: str,
        workflow: Workflow[Any, Any],
        input: Any = None,
        *,
        queue: str | None = None,
        priority: int | None = None,
    ) -> Child[Any]:
        return (await self._spawn(name, workflow, [input], queue, priority))[0]

    @tracked
    async def spawn_many(
        self,
        name: str,
        workflow: Workflow[Any, Any],
        inputs: Iterable[Any],
        *,
        queue: str | None = None,
        priority: int | None = None,
    ) -> Sequence[Child[Any]]:
        given = list(inputs)
        children: list[Child[Any]] = []
        for at in range(0, len(given), MAX_CHILDREN):
            part = f"{name}+{at}" if at else name
            children += await self._spawn(part, workflow, given[at : at + MAX_CHILDREN], queue, priority)
        return children

    async def _spawn(
        self, name: str, flow: Workflow[Any, Any], inputs: list[Any], queue: str | None, priority: int | None
    ) -> list[ChildRun]:
        branch, found = self._look_up("spawn", name)
        if found is None:
            await self._begin()
            children = ChildIds.generate(flow.name, len(inputs))
            rows = child_rows(name, flow, children, inputs, queue, priority)
            checkpoint = self.history.number(branch.place, "spawn", name, children.to_json())
            version, trace = self.history.take_version(), trace_to_write()
            if trace is None:
                await self._submit(SpawnChildren(self.lease, checkpoint, version, rows))
            else:
                await self._submit(SpawnTraced(self.lease, checkpoint, version, rows, trace))
            self.history.failed_before = 0
        else:
            try:
                children = ChildIds.from_json(name, found.result, flow.name, len(inputs))
            except ReplayError as error:
                self._stop_for_error(error)
        return [ChildRun(self.results, name, flow, id) for id in children.ids]

    @tracked
    async def results(self, children: Sequence[Child[Any]], *, return_exceptions: bool = False) -> list[Any]:
        results: list[Any] = []
        errors: list[BaseException] = []
        failures: list[int] = []
        for at in range(0, len(children), MAX_CHILDREN):
            branch, found = await self._wait_for_children(part := children[at : at + MAX_CHILDREN])
            ends = zip(part, decode_results(found), strict=True)
            decoded = [child.decode_result(*end) for child, end in ends]  # type: ignore[attr-defined]
            results += decoded
            if wrong := [one for one in decoded if isinstance(one, Exception)]:
                errors += wrong
                failures.append(found.number)
        if errors:
            branch.note_errors(errors, failures)
            if not return_exceptions:
                raise errors[0]
        return results

    async def _wait_for_children(self, children: Sequence[Any]) -> tuple[Branch, Checkpoint]:
        """Wait until children have ended, and return the checkpoint of their results."""
        name = children[0].name
        branch, found = self._look_up("children", name)
        if found is None:
            await self._begin()
            ids = list(dict.fromkeys(child.id for child in children))
            while len(ended := await self._submit(CollectResults(ids))) < len(ids):
                missing = tuple(id for id in ids if id not in ended)
                await self._wait(Wait(f"{len(missing)} children of {name}", children=missing))
            payload = encode_results([ended[child.id] for child in children])
            found = self.history.number(branch.place, "children", name, payload)
            self.uncommitted.add(found)
        return branch, found

    # --- values

    @tracked
    async def now(self) -> datetime:
        found: datetime = await self._record_value("now", datetime, self._journal.now)
        return found

    @tracked
    async def random(self) -> float:
        found: float = await self._record_value("random", float, random.random)
        return found

    @tracked
    async def uuid(self) -> UUID:
        found: UUID = await self._record_value("uuid", UUID, uuid4)
        return found

    async def _record_value(self, name: str, type: Any, make: Any) -> Any:
        branch, found = self._look_up("value", name)
        codec = codec_of(type)
        if found is None:
            await self._begin()
            found = self.history.number(branch.place, "value", name, codec.encode(make()).decode())
            self.uncommitted.add(found)
        assert found.result is not None
        return codec.decode(found.result)

    def idempotency_key(self, name: str) -> str:
        return f"{self.run_id}/{name}"

    # --- branches

    @tracked
    async def gather(self, *steps: Awaitable[Any], return_exceptions: bool = False) -> list[Any]:
        branch = self._current_branch("ctx.gather()")
        place = branch.next_place()
        if not steps:
            return []
        try:
            ended = await self._branches.gather(place, steps)
        except asyncio.CancelledError:
            self._note_cut_off(branch)
            raise
        self._refuse_if_stopped()
        failed = [(strand, error) for strand, _, error in ended if error is not None]
        failures = [number for strand, error in failed for number in strand.failures_behind(error)]
        branch.note_errors([error for _, error in failed], failures)
        for _, error in failed:
            if not (return_exceptions and isinstance(error, Exception)):
                raise error
        return [value if error is None else error for _, value, error in ended]

    def _look_up(self, kind: str, name: str) -> tuple[Branch, Checkpoint | None]:
        """Move the current branch to its next place, and return it with the checkpoint there."""
        self._refuse_if_stopped()
        branch = self._current_branch(kind, name)
        try:
            check_name(kind, name, ReplayError)
            return branch, self.history.look_up(branch.next_place(), kind, name)
        except ReplayError as error:
            self._stop_for_error(error)

    def _current_branch(self, kind: str, name: str = "") -> Branch:
        """Return the branch that makes a call."""
        branch = self._branches.current()
        if branch is None or branch.step is not None:
            self._stop_for_error(misplaced_error(f"{kind} {name!r}" if name else kind, branch))
        branch.kind, branch.name = kind, name
        return branch

    async def _wait(self, wait: Wait) -> None:
        """Wait in the current branch."""
        try:
            await self._branches.wait(wait)
        except (asyncio.CancelledError, GeneratorExit) as error:
            if is_cancelled() or isinstance(error, GeneratorExit):
                self._note_cut_off()
            raise

    async def _suspend(self, waits: list[Wait]) -> None:
        """Release the lease, as all branches wait; unless something has come meanwhile: then all look again."""
        await self.uncommitted.wait()
        self._refuse_if_stopped()
        due_at = min((wait.due_at for wait in waits if wait.due_at is not None), default=None)
        groups = [wait.children for wait in waits if wait.children]
        seen_at = min((wait.seen_at for wait in waits if wait.seen_at is not None), default=self._wakeup_at)
        what = ", ".join(dict.fromkeys(wait.what for wait in waits[:10]))
        children = [child for ids in groups for child in ids]
        await self._refuse_timeouts(what)
        tried, any_child = self.history.failed_before, len(groups) > 1
        self._wakeup_at = await self._submit(Suspend(self.lease, seen_at, due_at, tried, what, any_child, children))
        if self._wakeup_at is None:
            self._stop(Handled(), f"it waits for {what}")

    async def _refuse_timeouts(self, what: str) -> None:
        """Stop the run if an `asyncio.timeout` of the workflow is around its wait."""
        if await find_timeout(lambda: [self.function, *self._branches.suspended_coroutines()]):
            self._stop_for_error(forgotten_timeout_error(what))

    # --- recording

    async def _begin(self) -> None:
        """Wait until all that the run has seen is durable, before it begins something that is not recorded. Refuse that
        if the run is stopped, or its worker leaves."""
        await self.uncommitted.wait()
        self._refuse_if_stopped()
        if self._runner.is_draining:
            self._stop(Requeue(0.0, self.failed_before), "its worker leaves")

    def _note_refusal(self, checkpoint: Checkpoint, error: BaseException) -> None:
        """Stop the run, as a checkpoint that its function has seen was not written."""
        if isinstance(error, RunStopped):
            self._lose(error)
        elif self.outcome is None:
            what = f"{checkpoint.kind} {checkpoint.name!r}"
            self.outcome = DataRefused(f"the database does not record {what}: {error}")
            self.outcome.__cause__ = error
            self._branches.stop(RunStopped(f"the run is stopped here: {what} was not recorded"))

    def _lose(self, lost: RunStopped) -> None:
        """Stop the run, since its lease was lost, and cancel what its other branches do."""
        self.uncommitted.drop()
        if self.outcome is None:
            self.outcome = Handled()
            self._branches.stop(lost)
            self._branches.cancel_others()

    async def _submit(self, entry: JournalEntry[AnswerT]) -> AnswerT:
        """Return the answer of the journal. A lost lease stops the run."""
        try:
            return await self._journal.submit(entry)
        except (asyncio.CancelledError, GeneratorExit):
            self._note_cut_off()
            raise
        except RunStopped as lost:
            self._lose(lost)
            raise

    # --- stopping

    def close(self) -> None:
        """Drop what refers back to this context, once the run has ended here: so the last reference to it frees it, and
        the garbage collector has nothing to find."""
        self.uncommitted.close()
        self._branches.close()

    @property
    def is_stopped(self) -> bool:
        """True if nothing that the code of the run does counts any more."""
        try:
            self._refuse_if_stopped()
        except RunStopped:
            return True
        return False

    @property
    def failed_before(self) -> int:
        """Failed tries outside of steps since the run last got a result."""
        return 0 if self.uncommitted.has_progress else self.history.failed_before

    def check_end(self) -> None:
        """Raise `ReplayError` if the workflow has returned without a recorded call, or without awaiting one."""
        self._refuse_if_stopped()
        self.unawaited.check_all()
        self.history.check_end()

    def failures_behind(self, error: BaseException) -> Sequence[int]:
        """The numbers of the checkpoints to forget when the run ends with an error that has left the function."""
        return self._branches.root.failures_behind(error)

    def _refuse_if_stopped(self) -> None:
        if self.outcome is not None:
            raise RunStopped("the run is stopped")
        if self._cut_off is not None:
            requeue = Requeue(0.0, self.failed_before)
            self._stop(requeue if self._runner.is_draining else self._cut_off, str(self._cut_off))

    def _stop_for_error(self, error: ReplayError) -> NoReturn:
        """Stop the run for an error in its code: it would go on with an exception that user code may catch."""
        self._refuse_if_stopped()
        self._stop(error, str(error))

    def _stop(self, outcome: Handled | Requeue | Exception, why: str) -> NoReturn:
        """Stop the run: waiting branches now, the others at their next call."""
        self.outcome = outcome
        stopped = RunStopped(f"the run is stopped here: {why}")
        self._branches.stop(stopped)
        raise stopped

    def _note_cut_off(self, branch: Branch | None = None) -> None:
        """Note that a cancellation has ended the last call of a branch (default: the current one).

        It is the workflow's own, unless the run is stopped or its lease was lost. The code that follows would
        contradict a replay, which is faster."""
        branch = branch or self._branches.current() or self._branches.root
        if self.outcome is None and self._cut_off is None and self.lease.is_running:
            self._cut_off = cut_off_error(branch.kind, branch.name, self._branches.tasks)


def _fail_branch(branch: Branch, error: PgtaskError, failure: Checkpoint) -> PgtaskError:
    """Note in a branch that an error, which is to be raised, follows from a checkpoint."""
    branch.note_errors([error], [failure.number])
    return error
