"""Little programs as the steps of a task: acts on asyncio, then an end. They run on the engine and on the oracle."""

# mypy: disable-error-code="no-any-return"

from __future__ import annotations

import asyncio
import collections
import contextvars
import re
import sys
import weakref
from collections.abc import Callable, Generator
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID

import asyncpg

from pgtask import App, Context, Done, Enqueue, Fail, Next, Policy, Task

__all__ = [
    "ERRORS",
    "MAX_STEP_BYTES",
    "NEW",
    "PLAY",
    "VARIABLE",
    "WRONG_ENDS",
    "Scene",
    "World",
    "current_loop",
    "me",
    "turns",
]

MAX_STEP_BYTES = 10_000
VARIABLE: contextvars.ContextVar[Any] = contextvars.ContextVar("VARIABLE", default="fresh")


@dataclass
class World:
    """The things that the steps of one run share, and their notes; `ctx.resources` of each."""

    notes: dict[UUID, list[str]] = field(default_factory=lambda: collections.defaultdict(list))
    callbacks: collections.Counter[UUID] = field(default_factory=collections.Counter)
    kept: list[tuple[Scenery, Callable[[], asyncio.Task[Any] | None]]] = field(default_factory=list)


@dataclass(eq=False)
class Scenery:
    """One try of one step."""

    world: World
    id: UUID
    task: asyncio.Task[Any]
    ended: bool = False

    def note(self, *what: object) -> None:
        text = " ".join(str(part) for part in what)
        self.world.notes[self.id].append(re.sub(r"<.*>", "<>", text))


def me() -> asyncio.Task[Any]:
    task = asyncio.current_task()
    assert task is not None
    return task


def current_loop() -> asyncio.AbstractEventLoop:
    return asyncio.get_running_loop()


def a_future() -> asyncio.Future[Any]:
    return current_loop().create_future()


def settle(future: asyncio.Future[Any], result: Any) -> None:
    """Give a future its result or exception, unless it was cancelled in the meantime."""
    if not future.done():
        if isinstance(result, Exception):
            future.set_exception(result)
        else:
            future.set_result(result)


async def turns(number: int) -> None:
    for _ in range(number):
        await asyncio.sleep(0)


class Yields:
    """An awaitable that yields one thing to the Task, and returns the Task's answer."""

    def __init__(self, thing: Any) -> None:
        self.thing = thing

    def __await__(self) -> Generator[Any, Any, Any]:
        return (yield self.thing)


Acts = list[Any]


async def act_turn(scenery: Scenery) -> None:
    await asyncio.sleep(0)


async def act_future(scenery: Scenery) -> None:
    future = a_future()
    current_loop().call_soon(settle, future, "a result")
    scenery.note(await future)


async def act_failing_future(scenery: Scenery) -> None:
    future = a_future()
    current_loop().call_soon(settle, future, ValueError("a failure"))
    try:
        await future
    except ValueError as error:
        scenery.note(repr(error), repr(error.__context__))


async def act_event(scenery: Scenery) -> None:
    event = asyncio.Event()
    current_loop().call_soon(event.set)
    scenery.note(await event.wait())


async def act_timer(scenery: Scenery) -> None:
    await asyncio.sleep(0.001)


async def act_spawn(scenery: Scenery, acts: Acts) -> None:
    await asyncio.create_task(perform(acts, scenery))


async def act_gather(scenery: Scenery, *many: Acts) -> None:
    results = await asyncio.gather(*(perform(acts, scenery) for acts in many), return_exceptions=True)
    scenery.note([type(result).__name__ for result in results])


async def act_group(scenery: Scenery, fails: bool, acts: Acts) -> None:
    async def child() -> None:
        await asyncio.sleep(0)
        if fails:
            raise KeyError("from the group")

    try:
        async with asyncio.TaskGroup() as group:
            group.create_task(child())
            await perform(acts, scenery)
            if fails:
                await turns(10)  # not forever: Python 3.11 loses cancellations between nested groups
    except* KeyError as errors:
        scenery.note(repr(errors), me().cancelling())


async def act_group_fails_at_once(scenery: Scenery) -> None:
    try:
        async with asyncio.TaskGroup() as group:
            group.create_task(asyncio.sleep(0))
            raise KeyError("from the body")
    except* KeyError as errors:
        scenery.note(repr(errors), me().cancelling())


async def act_timeout(scenery: Scenery, acts: Acts) -> None:
    try:
        async with asyncio.timeout(None) as timeout:
            await perform(acts, scenery)
            timeout.reschedule(current_loop().time())
            await asyncio.sleep(60)
    except TimeoutError as error:
        scenery.note(repr(error), type(error.__cause__).__name__, timeout.expired(), me().cancelling())


async def act_timeout_in_time(scenery: Scenery, acts: Acts) -> None:
    async with asyncio.timeout(3600) as timeout:
        await perform(acts, scenery)
    scenery.note(timeout.expired())


async def act_wait_for(scenery: Scenery) -> None:
    try:
        await asyncio.wait_for(asyncio.sleep(60), 0.001)
    except TimeoutError as error:
        scenery.note(repr(error), me().cancelling())


async def act_cancel_self(scenery: Scenery) -> None:
    me().cancel("oneself")
    scenery.note(me().cancelling())


async def act_catch(scenery: Scenery, acts: Acts) -> None:
    """Swallow a cancellation."""
    try:
        await perform(acts, scenery)
        await asyncio.sleep(0)
    except asyncio.CancelledError as error:
        scenery.note("caught", error.args, repr(error.__context__), me().cancelling(), me().uncancel())


async def act_cancel_soon(scenery: Scenery) -> None:
    current_loop().call_soon(me().cancel)
    await asyncio.sleep(60)


async def act_cancel_later(scenery: Scenery) -> None:
    handle = current_loop().call_later(0.001, me().cancel, "later")
    try:
        await asyncio.sleep(60)
    finally:
        handle.cancel()


async def act_set(scenery: Scenery, value: int) -> None:
    VARIABLE.set(value)


async def act_get(scenery: Scenery) -> None:
    scenery.note(VARIABLE.get())


async def act_reset_later(scenery: Scenery) -> None:
    """Reset a token: it is valid only in the context that made it."""
    token = VARIABLE.set("for a while")
    await asyncio.sleep(0)
    scenery.note(VARIABLE.get())
    VARIABLE.reset(token)


async def act_get_in_callback(scenery: Scenery) -> None:
    future = a_future()
    current_loop().call_soon(lambda: settle(future, VARIABLE.get()))
    scenery.note(await future)


async def act_me(scenery: Scenery) -> None:
    scenery.note(me() is scenery.task, scenery.task in asyncio.all_tasks(), scenery.task.done(), me().cancelling())


async def act_callback(scenery: Scenery) -> None:
    def called(task: asyncio.Task[Any]) -> None:
        scenery.world.callbacks[scenery.id] += task.done()

    scenery.task.add_done_callback(called)


async def act_shield(scenery: Scenery) -> None:
    inner = asyncio.ensure_future(asyncio.sleep(0, "shielded"))
    current_loop().call_soon(me().cancel)
    try:
        await asyncio.shield(inner)
    except asyncio.CancelledError:
        scenery.note("cancelled", inner.cancelled(), me().uncancel())
    scenery.note(await inner)


async def act_keep(scenery: Scenery) -> None:
    task = me()
    scenery.world.kept.append((scenery, lambda: task))


async def act_keep_weakly(scenery: Scenery) -> None:
    scenery.world.kept.append((scenery, weakref.ref(me())))


async def act_cancel_kept(scenery: Scenery) -> None:
    """Cancel the Tasks of steps that have ended."""
    for owner, reference_to in scenery.world.kept:
        task = reference_to()
        if owner.ended and task is not None:
            assert task is not me()
            task.cancel()


async def act_take_back(scenery: Scenery) -> None:
    me().cancel()
    scenery.note(me().uncancel())


async def act_rename(scenery: Scenery) -> None:
    me().set_name("renamed")


async def act_generator(scenery: Scenery) -> None:
    async def numbers() -> Any:
        try:
            for number in range(3):
                await asyncio.sleep(0)
                yield number
        finally:
            await asyncio.sleep(0)
            scenery.note("closed")

    generator = numbers()
    async for number in generator:
        scenery.note(number)
        if number == 1:
            break
    await generator.aclose()


async def act_odd(scenery: Scenery, what: str) -> None:
    things: dict[str, Any] = {"none": None, "number": 5, "future": a_future(), "me": me()}
    try:
        scenery.note(await (things[what] if what == "me" else Yields(things[what])))
    except RuntimeError as error:
        scenery.note(repr(error))


async def act_handle(scenery: Scenery) -> None:
    try:
        raise LookupError
    except LookupError:
        await asyncio.sleep(0)
        scenery.note("handling", sys.exc_info()[0])


async def act_exc_info(scenery: Scenery) -> None:
    scenery.note("handling", sys.exc_info()[0])


ACTS = {name.removeprefix("act_"): function for name, function in list(globals().items()) if name.startswith("act_")}


async def perform(acts: Acts, scenery: Scenery) -> None:
    for name, *arguments in acts:
        await ACTS[name](scenery, *arguments)


class Stop(BaseException):
    """A BaseException that is neither an Exception nor one of Python's own."""


ERRORS: dict[str, BaseException | type[BaseException]] = {
    "value": ValueError("wrong"),
    "system exit": SystemExit(3),
    "interrupt": KeyboardInterrupt(),
    "generator exit": GeneratorExit(),
    "cancelled": asyncio.CancelledError("from nowhere"),
    "stop iteration": StopIteration(5),
    "stop async iteration": StopAsyncIteration(),
    "base": Stop("base"),
    "timeout": TimeoutError("mine"),
    "connection lost": asyncpg.ConnectionDoesNotExistError("connection was closed in the middle of operation"),
    "statement wrong": asyncpg.UniqueViolationError("duplicate key"),
    "group": ExceptionGroup("several", [ValueError("one"), KeyError("two")]),
    "class": ZeroDivisionError,
}


def ending(end: list[Any]) -> Any:
    kind, *arguments = end
    match kind:
        case "done":
            return Done()
        case "fail":
            return Fail("enough")
        case "raise":
            raise ERRORS[arguments[0]]
        case "raise from":
            try:
                raise KeyError("inner")
            except KeyError as error:
                raise ValueError("outer") from error
        case "raise while":
            try:
                raise KeyError("inner")
            except KeyError:
                raise ValueError("outer")  # noqa: B904
        case "next":
            return Next(Scene(*arguments))
        case "later":
            return Next(Scene(*arguments), after=timedelta(seconds=5))
        case "at once":
            return Next(Scene(*arguments), after=timedelta(0))
        case "elsewhere":
            return Next(Elsewhere(*arguments))
        case "urgent":
            return Next(Urgent(*arguments))
        case "spreads":
            return Done(enqueue=(NEW[name]() for name in arguments))
        case "spreads and goes on":
            return Next(Scene([], ["done"]), enqueue=[NEW[name]() for name in arguments])
        case "spreads and waits":
            return Next(Scene([], ["done"]), after=timedelta(seconds=5), enqueue=[NEW[name]() for name in arguments])
    return WRONG_ENDS[kind]()


NEW: dict[str, Callable[[], Any]] = {
    "scene": lambda: Scene([], ["done"]),
    "elsewhere": lambda: Elsewhere([], ["done"]),
    "urgent": lambda: Urgent([1], ["done"]),
    "keyed": lambda: Enqueue(Undeclared(), key="a key"),
    "placed": lambda: Enqueue(Urgent([], ["done"]), after=timedelta(seconds=3), queue="q", priority=-1),
    "at a time": lambda: Enqueue(Scene([], ["done"]), at=datetime(2099, 1, 1, tzinfo=UTC)),
    "nothing": lambda: None,
    "a class": lambda: Scene,
    "an outcome": Done,
    "wrong field": lambda: Scene(5, ["done"]),  # type: ignore[arg-type]
    "too large": lambda: Scene(["x" * MAX_STEP_BYTES], ["done"]),
    "raises": lambda: [].pop(),
}
"""The new tasks of an outcome, good and bad."""

WRONG_ENDS: dict[str, Callable[[], Any]] = {
    "nothing": lambda: None,
    "number": lambda: 5,
    "next of a class": lambda: Next(Scene),
    "next of nothing": lambda: Next(None),
    "undeclared": lambda: Next(Undeclared()),
    "the step": lambda: Scene([], ["done"]),
    "done as a class": lambda: Done,
    "a coroutine function": lambda: act_turn,
    "not encodable": lambda: Next(Scene([object()], ["done"])),
    "wrong field": lambda: Next(Scene(5, ["done"])),  # type: ignore[arg-type]
    "surrogate": lambda: Next(Scene(["\ud800"], ["done"])),
    "too large": lambda: Next(Scene(["x" * MAX_STEP_BYTES], ["done"])),
    "negative delay": lambda: Next(Scene([], ["done"]), after=timedelta(seconds=-1)),
    "delay as a number": lambda: Next(Scene([], ["done"]), after=5),  # type: ignore[arg-type]
    "fail without text": lambda: Fail(5),  # type: ignore[arg-type]
    "derived": lambda: type("Finished", (Done,), {})(),
}


class Play(Task):
    """Steps that play a little program: acts, then an end."""

    policy = Policy(retry_limit=1, retry_delay=timedelta(seconds=7))


class Scene(Play):
    acts: list[Any]
    end: list[Any]

    async def run(self, ctx: Context) -> Next[Scene | Elsewhere | Urgent] | Done | Fail:
        return await enact(self.acts, self.end, ctx)


class Elsewhere(Play):
    policy = Policy(queue="elsewhere")
    acts: list[Any]
    end: list[Any]

    async def run(self, ctx: Context) -> Next[Scene | Elsewhere | Urgent] | Done | Fail:
        return await enact(self.acts, self.end, ctx)


class Urgent(Play):
    policy = Policy(priority=7, retry_limit=2, backoff="exponential")
    acts: list[Any]
    end: list[Any]

    async def run(self, ctx: Context) -> Next[Scene | Elsewhere | Urgent] | Done | Fail:
        return await enact(self.acts, self.end, ctx)


class Hurried(Play):
    policy = Policy(timeout=timedelta(milliseconds=2.5), retry_limit=1)
    acts: list[Any]
    end: list[Any]

    async def run(self, ctx: Context) -> Next[Scene] | Done | Fail:
        return await enact(self.acts, self.end, ctx)


class Undeclared(Play):
    async def run(self, ctx: Context) -> Done:
        return Done()


async def enact(acts: Acts, end: list[Any], ctx: Context) -> Any:
    scenery = Scenery(ctx.resources, ctx.task_id, me())
    state = VARIABLE.get(), sys.exc_info()[0], me().cancelling(), me().get_name() == "renamed"
    scenery.note("try", ctx.attempt, *state)
    try:
        await perform(acts, scenery)
        return ending(end)
    finally:
        scenery.ended = True


PLAY = App(Play)
