"""One run of a workflow in a worker: what its function asks of the context, answered from the journal or by doing it.

Invariants: what user code gets to see is durable, and a replay sees what was seen the first time. Once a run is
stopped, everything that is asked of it raises `RunStopped`.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Awaitable, Iterable, Sequence
from datetime import datetime, timedelta
from typing import Any, NoReturn
from uuid import UUID, uuid4

import msgspec

from pgtask._fastpath import Again, Lease, Written
from pgtask._json_types import codec_of
from pgtask._worker.calls import Calls, result_codec
from pgtask._worker.children import MOST_CHILDREN, ChildRun, Family, child_rows
from pgtask._worker.entries import Checkpoint, History, Journalled, Pause
from pgtask._worker.error_text import describe
from pgtask._worker.replay import Branch, Replay
from pgtask._worker.waits import Wait, Waits
from pgtask.errors import DecodeError, ReplayError, RunStopped, SignalTimeout, StepFailed
from pgtask.policy import Policy
from pgtask.task import Context
from pgtask.workflow import Child, Permanent, Transient, Workflow, WorkflowContext, check_name

__all__ = ["Run"]


class Run(WorkflowContext):
    """The context of one run, for as long as it is driven here under one lease."""

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
        self._journal = journal
        self._calls = calls
        self._replay = Replay(history.checkpoints)
        self._unsaid_version = self.version if history.version is None else None
        self._wakeup_at = history.wakeup_at
        self._waits = Waits(self._let_go, journal.now)
        self._branches: dict[Any, Branch] = {asyncio.current_task(): Branch()}
        self._failed_before = lease.tried
        self._failures: dict[str, int] = {}  # tries of steps that failed here
        self.failed_checkpoints: dict[str, int] = {}
        """The numbers of the checkpoints that say that a step has failed."""

    # --- asking and recording

    def _find(self, kind: str, name: str) -> tuple[str, Checkpoint | None]:
        """The next place of this branch, and what is recorded there."""
        self._refuse_if_stopped()
        check_name(kind, name, ReplayError)
        branch = self._branches.get(asyncio.current_task())
        if branch is None:
            raise ReplayError(
                f"{kind} {name!r} is awaited in a task of its own, in which its place is not known; use ctx.gather(...)"
            )
        place = branch.next_place()
        return place, self._replay.find(place, kind, name)

    def _refuse_if_stopped(self) -> None:
        if self.verdict is not None:
            raise RunStopped("the run is stopped")

    def _begin(self) -> None:
        """Something is about to be done that is not recorded: not if the run is stopped, or its worker leaves."""
        self._refuse_if_stopped()
        if self._calls.is_draining:
            self._stop(Again(0.0, self._failed_before), "its worker leaves")

    def _stop(self, verdict: Written | Again | Exception, why: str) -> NoReturn:
        """Stop the run: in branches that wait now, in the others when they ask for something."""
        self.verdict = verdict
        stopped = RunStopped(f"the run is stopped here: {why}")
        self._waits.stop(stopped)
        raise stopped

    async def _written(self, entry: asyncio.Future[Any]) -> Any:
        """What the journal answers. When the lease is lost the run is stopped, and steps that still run are cancelled."""
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

    async def _record(self, checkpoint: Checkpoint) -> None:
        await self._written(self._journal.record(self.lease, checkpoint, self._version()))
        self._failed_before = 0

    def check_end(self) -> None:
        """The function has returned. Raises `ReplayError` for what it did not ask for."""
        self._replay.check_end()

    def encode_output(self, output: Any) -> str:
        """The output as JSON. Raises `Permanent`."""
        return self._encode(f"workflow {self.flow.name}", codec_of(self.flow.types[1]), output).decode()

    def tried(self, name: str = "") -> int:
        """Count a failed try of a step, or of what is outside of steps."""
        if name not in self._failures:
            self._failures[name] = self._failed_before
        self._failures[name] += 1
        return self._failures[name]

    # --- steps

    async def step(self, name: str, function: Any, /, *args: Any, policy: Policy | None = None) -> Any:
        place, found = self._find("step", name)
        codec = result_codec(name, function)
        if found is not None:
            if found.error is not None:
                self.failed_checkpoints[name] = found.number
                raise StepFailed(name, found.error)
            assert found.result is not None
            return codec.decode(found.result)
        policy = policy or self.flow.policy
        while True:
            self._begin()
            began = time.monotonic()
            try:
                value = await self._calls.call(name, function, args, policy)
                payload = self._encode(f"step {name}", codec, value)
                break
            except Exception as error:
                await self._failed(name, place, error, policy, began)
        number = self._replay.next_number()
        seconds = time.monotonic() - began
        await self._record(Checkpoint(number, place, "step", name, payload.decode(), seconds=seconds))
        return codec.decode(payload)

    def _encode(self, what: str, codec: Any, value: Any) -> bytes:
        """A value as JSON that can be read back. Raises `Permanent`."""
        try:
            payload: bytes = codec.encode(value)
            codec.decode(payload)
        except Exception as error:
            raise Permanent(f"{what} returned what cannot be recorded: {error}") from error
        if len(payload) > self._calls.most_bytes:
            raise Permanent(
                f"{what} returned {len(payload)} bytes of JSON, more than the {self._calls.most_bytes} allowed "
                "(--max-step-bytes); store it elsewhere and return a reference to it"
            )
        return payload

    async def _failed(self, name: str, place: str, error: Exception, policy: Policy, began: float) -> None:
        """Wait for the next try of a step, or record that it has failed for good and raise `StepFailed`."""
        if self._calls.is_interruption(error):
            self._stop(error, "the database went away under a step")
        tried = self.tried(name)
        if isinstance(error, (Permanent, StepFailed)) or tried > policy.retry_limit:
            number = self._replay.next_number()
            text = describe(error)
            seconds = time.monotonic() - began
            await self._record(Checkpoint(number, place, "step", name, error=text, seconds=seconds))
            self.failed_checkpoints[name] = number
            raise StepFailed(name, text) from error
        delay = policy.delay_before_retry(tried)
        if isinstance(error, Transient) and error.retry_after is not None:
            delay = error.retry_after.total_seconds()
        self._calls.say_failed(self.lease, error, delay)
        due_at = self._journal.now() + timedelta(seconds=delay)
        await self._waits.wait(Wait(f"retry of step {name}", due_at, tried=tried))

    # --- branches and waits

    async def gather(self, *steps: Awaitable[Any], return_exceptions: bool = False) -> list[Any]:
        branch = self._branches.get(asyncio.current_task())
        if branch is None:
            raise ReplayError("ctx.gather() is awaited in a task of its own; put it into another ctx.gather(...)")
        place = branch.next_place()
        if not steps:
            return []
        self._waits.begin(len(steps) - 1)  # this one is at work in them
        left = [len(steps)]
        tasks = [
            asyncio.create_task(self._strand(Branch(f"{place}.{at}."), step, left)) for at, step in enumerate(steps)
        ]
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
        for error in errors:
            if error is not None and not (return_exceptions and isinstance(error, Exception)):
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
        due_at = min((wait.due_at for wait in waits if wait.due_at is not None), default=None)
        tried = max(wait.tried for wait in waits)
        if all(wait.tried for wait in waits):
            assert due_at is not None
            delay = max(0.0, (due_at - self._journal.now()).total_seconds())
            self._stop(Again(delay, tried), "a step is to be tried again")
        groups = [wait.children for wait in waits if wait.children]
        seen_at = min((wait.seen_at for wait in waits if wait.seen_at is not None), default=self._wakeup_at)
        what = ", ".join(dict.fromkeys(wait.what for wait in waits[:10]))
        pause = Pause(seen_at, due_at, tried, what, len(groups) > 1, [child for ids in groups for child in ids])
        self._wakeup_at = await self._written(self._journal.pause(self.lease, pause))
        if self._wakeup_at is None:
            self._stop(Written(), f"it waits for {what}")

    async def sleep(self, name: str, duration: timedelta) -> None:
        if not isinstance(duration, timedelta):
            raise ReplayError(f"sleep {name!r} takes a timedelta, not {duration!r:.80}")
        place, found = self._find("sleep", name)
        if found is None:
            self._begin()
            found = Checkpoint(
                self._replay.next_number(), place, "sleep", name, due_at=self._journal.now() + duration
            )
            await self._record(found)
        assert found.due_at is not None
        while self._journal.now() < found.due_at:
            await self._waits.wait(Wait(f"sleep {name}", found.due_at))

    async def wait_for_signal(self, name: str, type: Any = Any, *, timeout: timedelta | None = None) -> Any:
        codec = codec_of(type)
        place, found = self._find("signal", name)
        if found is None:
            due_at = None if timeout is None else self._journal.now() + timeout
            found = Checkpoint(self._replay.next_number(), place, "signal", name, due_at=due_at)
        result, error, due_at = found.result, found.error, found.due_at
        while result is None and error is None:
            self._begin()
            taken = await self._written(self._journal.take(self.lease, found, self._version()))
            result, error, due_at = taken.result, taken.error, taken.due_at
            if result is None and error is None:
                await self._waits.wait(Wait(f"signal {name}", due_at, taken.wakeup_at))
        if result is None:
            raise SignalTimeout(f"no signal {name} has come in time")
        try:
            return codec.decode(result)
        except msgspec.DecodeError as wrong:
            raise DecodeError(f"signal {name} cannot be read: {wrong}") from None

    # --- children

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
        for at in range(0, len(given), MOST_CHILDREN):
            part = f"{name}+{at}" if at else name
            children += await self._spawn(part, workflow, given[at : at + MOST_CHILDREN], queue, priority)
        return children

    async def _spawn(
        self, name: str, flow: Workflow[Any, Any], inputs: list[Any], queue: str | None, priority: int | None
    ) -> list[ChildRun]:
        place, found = self._find("spawn", name)
        if found is None:
            self._begin()
            family = Family.new(flow.name, len(inputs))
            rows = child_rows(name, flow, family, inputs, queue, priority)
            checkpoint = Checkpoint(self._replay.next_number(), place, "spawn", name, family.to_json())
            await self._written(self._journal.spawn(self.lease, checkpoint, self._version(), rows))
            self._failed_before = 0
        else:
            family = Family.from_json(name, found.result, flow.name, len(inputs))
        return [ChildRun(self, name, flow, id) for id in family.ids]

    async def results(self, children: Sequence[Child[Any]], *, return_exceptions: bool = False) -> list[Any]:
        results: list[Any] = []
        for at in range(0, len(children), MOST_CHILDREN):
            results += await self._results(children[at : at + MOST_CHILDREN])
        for result in results:
            if isinstance(result, Exception) and not return_exceptions:
                raise result
        return results

    async def _results(self, children: Sequence[Any]) -> list[Any]:
        name = children[0].name
        place, found = self._find("children", name)
        if found is None:
            self._begin()
            ids = [child.id for child in children]
            while len(ended := await self._written(self._journal.collect(ids))) < len(ids):
                missing = tuple(id for id in ids if id not in ended)
                await self._waits.wait(Wait(f"{len(missing)} children of {name}", children=missing))
            outcomes = [ended[id] for id in ids]
            payload = msgspec.json.encode(
                [(state, msgspec.Raw((output or "null").encode()), error) for state, output, error in outcomes]
            )
            found = Checkpoint(self._replay.next_number(), place, "children", name, payload.decode())
            await self._record(found)
        return [child.read(*outcome) for child, outcome in zip(children, _outcomes(found), strict=True)]

    # --- values

    async def now(self) -> datetime:
        found: datetime = await self._value("now", datetime, self._journal.now)
        return found

    async def random(self) -> float:
        found: float = await self._value("random", float, random.random)
        return found

    async def uuid(self) -> UUID:
        found: UUID = await self._value("uuid", UUID, uuid4)
        return found

    async def _value(self, name: str, type: Any, make: Any) -> Any:
        place, found = self._find("value", name)
        codec = codec_of(type)
        if found is None:
            self._begin()
            payload = codec.encode(make()).decode()
            found = Checkpoint(self._replay.next_number(), place, "value", name, payload)
            await self._record(found)
        assert found.result is not None
        return codec.decode(found.result)

    def idempotency_key(self, name: str) -> str:
        return f"{self.run_id}/{name}"


def _outcomes(checkpoint: Checkpoint) -> list[tuple[str, msgspec.Raw, str | None]]:
    assert checkpoint.result is not None
    return msgspec.json.decode(checkpoint.result, type=list[tuple[str, msgspec.Raw, str | None]])
