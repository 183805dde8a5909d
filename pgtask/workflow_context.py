"""The interface of a workflow to its run: the context, and the children that it spawns.

Invariant: a workflow reaches the world through its context alone. So a replay, which makes the same calls, gets the
recorded answers.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable, Iterable, Sequence
from datetime import datetime, timedelta
from typing import TYPE_CHECKING, Any, TypeVar, TypeVarTuple, overload
from uuid import UUID

from pgtask._occurrences import scheduled_time
from pgtask.policy import Policy
from pgtask.task import Database
from pgtask.workflow import Workflow

if TYPE_CHECKING:
    from pgtask.client import Client

__all__ = ["Child", "WorkflowContext"]

T = TypeVar("T")
InputT = TypeVar("InputT")
OutputT = TypeVar("OutputT")
Ts = TypeVarTuple("Ts")


class Child(Awaitable[T], ABC):
    """A run that a workflow has spawned."""

    id: UUID

    @abstractmethod
    async def result(self) -> T:
        """Wait for the end of the child, and return its result. The run pauses until then.

        Raises `RunFailed` if the child ends as ERROR, and `RunCancelled`.
        """


class WorkflowContext(ABC):
    """The interface of a workflow to its run. Each call has a place in the journal of the run: it is answered once, and
    each replay gets the same answer.

    - `run_id`: the id of the run, and of its task.
    - `attempt`: the number of this try of the code outside of steps, from 1, since the run last got a result.
    - `version`: the version of the workflow under which the run began.
    - `db`, `client`, `resources`: as in `Context`, for you to hand to steps. Do not query or enqueue outside of a step.

    All of its coroutines raise `RunStopped` (not an `Exception`) when the run must not go on here; also when the
    journal has something else at their place, which ends the run with a `ReplayError`. Await them one after the other
    or in `ctx.gather`, not in tasks of your own, nor inside a step.
    """

    run_id: UUID
    attempt: int
    version: int
    db: Database
    resources: Any

    @property
    @abstractmethod
    def client(self) -> Client:
        """The client of the worker, for steps that are `async def`."""

    @property
    def scheduled_for(self) -> datetime | None:
        """The time for which a schedule has started this run, the same in each replay; None if no schedule has."""
        return scheduled_time(self.run_id)

    @overload
    async def step(
        self, name: str, function: Callable[[*Ts], Awaitable[T]], /, *args: *Ts, policy: Policy | None = None
    ) -> T: ...
    @overload
    async def step(self, name: str, function: Callable[[*Ts], T], /, *args: *Ts, policy: Policy | None = None) -> T: ...
    @abstractmethod  # type: ignore[misc]  # mypy does not see that *Any takes what *Ts does
    async def step(self, name: str, function: Callable[..., Any], /, *args: Any, policy: Policy | None = None) -> Any:
        """Call `function(*args)`, record its result, and return it.

        An `async def` runs on the worker's loop, a plain function in a thread. The result is stored as JSON and read
        back by the return annotation, the first time too.

        An exception is retried by `policy` (default: that of the workflow; its queue and priority do not count). Tries
        and the time of the next one are recorded, and the run pauses if none of its branches works. After the last try,
        or at once for `Permanent`, `StepFailed` is raised here, now and in each replay. A `timeout` counts from the
        call of the function. Give each step of a run a name of its own.
        """

    @abstractmethod
    async def gather(self, *steps: Awaitable[Any], return_exceptions: bool = False) -> list[Any]:
        """Run several calls of this context at once; return their results in order, when all have ended.

        Raises the first exception among them, in their order; with `return_exceptions` the list has it in its place.
        """

    @abstractmethod
    async def sleep(self, name: str, duration: timedelta) -> None:
        """Wait until `duration` has passed since the first call, by the database's clock."""

    @overload
    async def wait_for_signal(self, name: str, type: type[T], *, timeout: timedelta | None = None) -> T: ...
    @overload
    async def wait_for_signal(self, name: str, type: Any = Any, *, timeout: timedelta | None = None) -> Any: ...
    @abstractmethod
    async def wait_for_signal(self, name: str, type: Any = Any, *, timeout: timedelta | None = None) -> Any:
        """Wait for the next signal of this name, and return its value as `type`; a signal sent before the call counts.
        You may wait for a name any number of times.

        Raises `SignalTimeout` when `timeout` has passed since the first call, and `DecodeError` when the signal is not
        of that type. If that ends the run, resuming it waits for the next signal.
        """

    @abstractmethod
    async def spawn(
        self,
        name: str,
        workflow: Workflow[InputT, OutputT],
        input: InputT | None = None,
        *,
        queue: str | None = None,
        priority: int | None = None,
    ) -> Child[OutputT]:
        """Trigger a run that is a child of this one: made exactly once, and cancelled with this run.

        `queue` and `priority` are by default those of the child's policy. Give each spawn a name of its own.
        """

    @abstractmethod
    async def spawn_many(
        self,
        name: str,
        workflow: Workflow[InputT, OutputT],
        inputs: Iterable[InputT],
        *,
        queue: str | None = None,
        priority: int | None = None,
    ) -> Sequence[Child[OutputT]]:
        """Spawn a child for each of the inputs, a thousand in a transaction."""

    @abstractmethod
    async def results(self, children: Sequence[Child[T]], *, return_exceptions: bool = False) -> list[Any]:
        """Wait until all children have ended, a thousand at a time, and return their results in order.

        Raises `RunFailed` or `RunCancelled` for the first that has no result; with `return_exceptions` the list has
        that in its place.
        """

    @abstractmethod
    async def now(self) -> datetime:
        """Return the time of the first call, by the database's clock."""

    @abstractmethod
    async def random(self) -> float:
        """Return a random number from 0 to 1, without 1, drawn at the first call."""

    @abstractmethod
    async def uuid(self) -> UUID:
        """Return a random UUID, drawn at the first call."""

    @abstractmethod
    def idempotency_key(self, name: str) -> str:
        """Return a key for calls to other systems: stable across tries and replays of this run, and unique to it."""
