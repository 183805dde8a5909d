"""What a workflow asks for while it runs, and its children.

Invariant: a workflow reaches the world through its context alone, so that a replay, which asks again, gets the recorded
answers.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable, Iterable, Sequence
from datetime import datetime, timedelta
from typing import TYPE_CHECKING, Any, TypeVar, TypeVarTuple, overload
from uuid import UUID

from pgtask.policy import Policy
from pgtask.workflow import Workflow

if TYPE_CHECKING:
    import asyncpg

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
        """What the child returns. The run pauses until then. Raises `RunFailed` or `RunCancelled` for how it ended."""


class WorkflowContext(ABC):
    """What a workflow asks for. Each method is a place in the journal of its run: it is answered once, and the answer
    is given again in each replay.

    - `run_id`: the id of the run, and of its task.
    - `attempt`: which try of the code outside of steps this is since the run last got a result, from 1.
    - `version`: the version of the workflow under which the run began.
    - `db`, `resources`: as in `Context`, to be handed to steps. Do not query outside of a step.

    All of its coroutines raise `RunStopped` (not an `Exception`) when the run must not go on here: then too when the
    journal has something else at their place, which ends the run with a `ReplayError`. Await them one after the other
    or in `ctx.gather`, not in tasks of your own, nor inside a step.
    """

    run_id: UUID
    attempt: int
    version: int
    db: asyncpg.Pool[asyncpg.Record]
    resources: Any

    @overload
    async def step(
        self, name: str, function: Callable[[*Ts], Awaitable[T]], /, *args: *Ts, policy: Policy | None = None
    ) -> T: ...
    @overload
    async def step(self, name: str, function: Callable[[*Ts], T], /, *args: *Ts, policy: Policy | None = None) -> T: ...
    @abstractmethod  # type: ignore[misc]  # mypy does not see that *Any takes what *Ts does
    async def step(self, name: str, function: Callable[..., Any], /, *args: Any, policy: Policy | None = None) -> Any:
        """Call `function(*args)` and record what it returns, before this returns.

        An `async def` runs on the worker's loop, a plain function in a thread. The result is stored as JSON and read
        back by the return annotation, the first time too. What it raises is retried by `policy` (default: that of the
        workflow; its queue and priority do not count): tries and the time of the next one are recorded, and the run
        pauses if nothing else of it is at work. Then, or at once for `Permanent`, `StepFailed` is raised here, now and
        in each replay. Each step of a run has a name of its own. A `timeout` counts from when the function is called.
        """

    @abstractmethod
    async def gather(self, *steps: Awaitable[Any], return_exceptions: bool = False) -> list[Any]:
        """Run several things of this context at once; their results in order, when all have ended.

        Raises the first exception among them, in their order; with `return_exceptions` it stands in its place.
        """

    @abstractmethod
    async def sleep(self, name: str, duration: timedelta) -> None:
        """Go on when `duration` has passed since this was first asked, by the database's clock."""

    @overload
    async def wait_for_signal(self, name: str, type: type[T], *, timeout: timedelta | None = None) -> T: ...
    @overload
    async def wait_for_signal(self, name: str, type: Any = Any, *, timeout: timedelta | None = None) -> Any: ...
    @abstractmethod
    async def wait_for_signal(self, name: str, type: Any = Any, *, timeout: timedelta | None = None) -> Any:
        """The next signal of this name, as `type`; one that was sent before counts. May be asked any number of times.

        Raises `SignalTimeout` when `timeout` has passed since this was first asked, and `DecodeError` when the signal
        is not of that type. If that ends the run, resuming it waits for the next one.
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
        """Trigger a run that is a child of this one: made once, whatever happens, and cancelled with this run.

        `queue` and `priority` are by default those of the child's policy. Each spawn has a name of its own.
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
        """`spawn` for each of the inputs, a thousand in a transaction."""

    @abstractmethod
    async def results(self, children: Sequence[Child[T]], *, return_exceptions: bool = False) -> list[Any]:
        """What the children return, in their order, when all have ended; waits for a thousand at a time.

        Raises `RunFailed` or `RunCancelled` for the first that has no result; with `return_exceptions` that stands in
        its place.
        """

    @abstractmethod
    async def now(self) -> datetime:
        """The time, by the database's clock, when this was first asked."""

    @abstractmethod
    async def random(self) -> float:
        """A number from 0 to 1, without 1, drawn when this was first asked."""

    @abstractmethod
    async def uuid(self) -> UUID:
        """A random UUID, drawn when this was first asked."""

    @abstractmethod
    def idempotency_key(self, name: str) -> str:
        """A key for calls to the outside: the same in each try and replay of this run, another in each other run."""
