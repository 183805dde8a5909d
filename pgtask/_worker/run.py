"""One run of a workflow in a worker: what its function asks of the context, answered from the journal or by doing it.

Invariants: what user code gets to see is durable, and a replay sees what was seen the first time. Once a run is
stopped, everything that is asked of it raises `RunStopped`.
"""

from __future__ import annotations

import random
import time
from collections.abc import Iterable, Sequence
from datetime import datetime, timedelta
from typing import Any
from uuid import UUID, uuid4

import msgspec

from pgtask._json_types import codec_of
from pgtask._worker.asked import noted
from pgtask._worker.calls import called
from pgtask._worker.children import MOST_CHILDREN, ChildRun, Family, child_rows
from pgtask._worker.entries import Checkpoint
from pgtask._worker.error_text import describe
from pgtask._worker.recording import Recording
from pgtask._worker.replay import Branch
from pgtask._worker.waits import Wait
from pgtask.errors import DecodeError, PgtaskError, ReplayError, SignalTimeout, StepFailed
from pgtask.policy import Policy
from pgtask.workflow import Permanent, Transient, Workflow
from pgtask.workflow_context import Child

__all__ = ["Run"]


class Run(Recording):
    """The context of one run, for as long as it is driven here under one lease."""

    # --- steps

    @noted
    async def step(  # type: ignore[override]  # the overloads are for users
        self, name: str, function: Any, /, *args: Any, policy: Policy | None = None
    ) -> Any:
        branch, found = self._find("step", name)
        codec, is_async = called(name, function)
        if found is not None and found.due_at is None:
            if found.error is not None:
                raise _noted(branch, StepFailed(name, found.error), found)
            assert found.result is not None
            return codec.decode(found.result)
        policy = policy or self.flow.policy
        while True:
            if found is not None:
                await self._until(found, f"try {found.tried + 1} of step {name}")
            self._begin()
            began = time.monotonic()
            branch.step = name
            try:
                value = await self._calls.call(name, function, args, policy, is_async=is_async)
                payload = self._encode(f"step {name}", codec, value)
                break
            except Exception as error:
                found = await self._failed(
                    branch, found or Checkpoint(0, branch.place, "step", name), error, policy, began
                )
            finally:
                branch.step = None
        number, tried = (self._replay.next_number(), 0) if found is None else (found.number, found.tried)
        seconds = time.monotonic() - began
        await self._record(
            Checkpoint(number, branch.place, "step", name, payload.decode(), tried=tried, seconds=seconds)
        )
        return codec.decode(payload)

    def encode_output(self, output: Any) -> str:
        """The output as JSON. Raises `Permanent`."""
        return self._encode(f"workflow {self.flow.name}", codec_of(self.flow.types[1]), output).decode()

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

    async def _failed(
        self, branch: Branch, before: Checkpoint, error: Exception, policy: Policy, began: float
    ) -> Checkpoint:
        """Record that a step is put off, or that it has failed for good, and then raise `StepFailed`."""
        if self._calls.is_interruption(error):
            self._stop(error, "the database went away under a step")
        tried = before.tried + 1
        text, seconds = describe(error), time.monotonic() - began
        failed = before._replace(
            number=before.number or self._replay.next_number(), error=text, due_at=None, tried=tried, seconds=seconds
        )
        if isinstance(error, (Permanent, StepFailed)) or tried > policy.retry_limit:
            await self._record(failed)
            raise _noted(branch, StepFailed(failed.name, text), failed) from error
        delay = policy.delay_before_retry(tried)
        if isinstance(error, Transient) and error.retry_after is not None:
            delay = error.retry_after.total_seconds()
        self._calls.say_failed(self.lease, error, delay, tried)
        put_off = failed._replace(due_at=self._journal.now() + timedelta(seconds=delay))
        await self._note(put_off)
        return put_off

    # --- waits

    @noted
    async def sleep(self, name: str, duration: timedelta) -> None:
        if not isinstance(duration, timedelta):
            self._refuse(ReplayError(f"sleep {name!r} takes a timedelta, not {duration!r:.80}"))
        branch, found = self._find("sleep", name)
        if found is None:
            self._begin()
            due_at = self._journal.now() + duration
            found = Checkpoint(self._replay.next_number(), branch.place, "sleep", name, due_at=due_at)
            await self._record(found)
        await self._until(found, f"sleep {name}")

    async def _until(self, checkpoint: Checkpoint, what: str) -> None:
        """Wait until a checkpoint is due."""
        assert checkpoint.due_at is not None
        while self._journal.now() < checkpoint.due_at:
            await self._waits.wait(Wait(what, checkpoint.due_at))

    @noted
    async def wait_for_signal(self, name: str, type: Any = Any, *, timeout: timedelta | None = None) -> Any:
        codec = codec_of(type)
        branch, found = self._find("signal", name)
        if found is None:
            due_at = None if timeout is None else self._journal.now() + timeout
            found = Checkpoint(self._replay.next_number(), branch.place, "signal", name, due_at=due_at)
        if found.result is None and found.error is None:
            found = await self._take(found)
        if found.result is None:
            raise _noted(branch, SignalTimeout(f"no signal {name} has come in time"), found)
        try:
            return codec.decode(found.result)
        except msgspec.DecodeError as wrong:
            raise _noted(branch, DecodeError(f"signal {name} cannot be read: {wrong}"), found) from None

    async def _take(self, wanted: Checkpoint) -> Checkpoint:
        """Wait for a signal, or for the end of the time for it; what is recorded then."""
        while True:
            self._begin()
            taken = await self._written(self._journal.take(self.lease, wanted, self._version()))
            if taken.is_over:
                self.failed_before = 0
                return wanted._replace(result=taken.result, error=taken.error)
            await self._waits.wait(Wait(f"signal {wanted.name}", taken.due_at, taken.wakeup_at))

    # --- children

    @noted
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

    @noted
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
        branch, found = self._find("spawn", name)
        if found is None:
            self._begin()
            family = Family.new(flow.name, len(inputs))
            rows = child_rows(name, flow, family, inputs, queue, priority)
            checkpoint = Checkpoint(self._replay.next_number(), branch.place, "spawn", name, family.to_json())
            await self._written(self._journal.spawn(self.lease, checkpoint, self._version(), rows))
            self.failed_before = 0
        else:
            try:
                family = Family.from_json(name, found.result, flow.name, len(inputs))
            except ReplayError as error:
                self._refuse(error)
        return [ChildRun(self, name, flow, id) for id in family.ids]

    @noted
    async def results(self, children: Sequence[Child[Any]], *, return_exceptions: bool = False) -> list[Any]:
        results: list[Any] = []
        errors: list[BaseException] = []
        failures: list[int] = []
        for at in range(0, len(children), MOST_CHILDREN):
            branch, found = await self._ended(part := children[at : at + MOST_CHILDREN])
            outcomes = zip(part, _outcomes(found), strict=True)
            read = [child.read(*outcome) for child, outcome in outcomes]  # type: ignore[attr-defined]
            results += read
            if wrong := [one for one in read if isinstance(one, Exception)]:
                errors += wrong
                failures.append(found.number)
        if errors:
            branch.fail(errors, failures)
            if not return_exceptions:
                raise errors[0]
        return results

    async def _ended(self, children: Sequence[Any]) -> tuple[Branch, Checkpoint]:
        """Wait until children have ended; what is recorded of how."""
        name = children[0].name
        branch, found = self._find("children", name)
        if found is None:
            self._begin()
            ids = list(dict.fromkeys(child.id for child in children))
            while len(ended := await self._written(self._journal.collect(ids))) < len(ids):
                missing = tuple(id for id in ids if id not in ended)
                await self._waits.wait(Wait(f"{len(missing)} children of {name}", children=missing))
            outcomes = [ended[child.id] for child in children]
            payload = msgspec.json.encode(
                [(state, msgspec.Raw((output or "null").encode()), error) for state, output, error in outcomes]
            )
            found = Checkpoint(self._replay.next_number(), branch.place, "children", name, payload.decode())
            await self._record(found)
        return branch, found

    # --- values

    @noted
    async def now(self) -> datetime:
        found: datetime = await self._value("now", datetime, self._journal.now)
        return found

    @noted
    async def random(self) -> float:
        found: float = await self._value("random", float, random.random)
        return found

    @noted
    async def uuid(self) -> UUID:
        found: UUID = await self._value("uuid", UUID, uuid4)
        return found

    async def _value(self, name: str, type: Any, make: Any) -> Any:
        branch, found = self._find("value", name)
        codec = codec_of(type)
        if found is None:
            self._begin()
            payload = codec.encode(make()).decode()
            found = Checkpoint(self._replay.next_number(), branch.place, "value", name, payload)
            await self._record(found)
        assert found.result is not None
        return codec.decode(found.result)

    def idempotency_key(self, name: str) -> str:
        return f"{self.run_id}/{name}"


def _noted(branch: Branch, error: PgtaskError, failure: Checkpoint) -> PgtaskError:
    """An error that follows from a checkpoint, to be raised in a branch."""
    branch.fail([error], [failure.number])
    return error


def _outcomes(checkpoint: Checkpoint) -> list[tuple[str, msgspec.Raw, str | None]]:
    assert checkpoint.result is not None
    return msgspec.json.decode(checkpoint.result, type=list[tuple[str, msgspec.Raw, str | None]])
