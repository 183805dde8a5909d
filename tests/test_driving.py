"""The dispatcher drives steps as `asyncio.create_task` would: little programs on both, and each promise by itself.

Time is no part of it: on asyncio the loop's clock jumps to the next timer as soon as nothing else is to be done.
"""

# mypy: disable-error-code="no-any-return"

from __future__ import annotations

import asyncio
import collections
import contextvars
import gc
import re
import selectors
import sys
import threading
import time
import weakref
from collections.abc import Awaitable, Callable, Coroutine, Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, Literal, NamedTuple, TypeVar
from uuid import UUID, uuid4

import asyncpg
import msgspec
import pytest
import reference
import uvloop
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from pgtask import App, Context, Done, Fail, Next, PgtaskError, Policy, Task
from pgtask._fastpath import Lease, Leases, Outcomes, Table
from pgtask._postgres.connection import is_connection_loss
from pgtask._worker.dispatch import Dispatch
from pgtask._worker.error_text import describe

T = TypeVar("T")
Clock = Literal["asyncio", "uvloop"]
MAX_STEP_BYTES = 10_000
GUARD = 10_000  # seconds after which a run on a clock that jumps is given up: nothing is left to be done
VARIABLE: contextvars.ContextVar[Any] = contextvars.ContextVar("VARIABLE", default="fresh")


# --- loops --------------------------------------------------------------------------------------------------------


class _JumpingSelector(selectors.DefaultSelector):
    """Never waits for a timer: it moves the clock instead."""

    now = 1000.0

    def select(self, timeout: float | None = None) -> Any:
        if timeout is not None and timeout > 0:
            if found := super().select(0 if timeout < GUARD / 2 else 10):  # threads are given real time
                return found
            self.now += timeout
            timeout = 0
        return super().select(timeout)


class JumpingLoop(asyncio.SelectorEventLoop):
    def __init__(self) -> None:
        self._clock = _JumpingSelector()
        super().__init__(self._clock)

    def time(self) -> float:
        return self._clock.now


LOOPS: dict[str, Callable[[], asyncio.AbstractEventLoop]] = {"asyncio": JumpingLoop, "uvloop": uvloop.new_event_loop}


@pytest.fixture(params=["asyncio", "uvloop"])
def clock(request: pytest.FixtureRequest) -> Clock:
    found: Clock = request.param
    return found


def play(clock: Clock, main: Coroutine[Any, Any, T], *, debug: bool = False) -> T:
    """Run `main` to its end; neither stray errors nor Tasks may be left."""
    stray: list[dict[str, Any]] = []

    async def watched() -> T:
        asyncio.get_running_loop().set_exception_handler(lambda _, context: stray.append(context))
        async with asyncio.timeout(GUARD if clock == "asyncio" else 30):
            result = await main
        for _ in range(20):
            if len(asyncio.all_tasks()) == 1:
                break
            await asyncio.sleep(0)
        assert asyncio.all_tasks() == {asyncio.current_task()}, "Tasks are left"
        return result

    with asyncio.Runner(loop_factory=LOOPS[clock], debug=debug) as runner:
        result = runner.run(watched())
    assert not stray, f"errors that nobody handled: {stray}"
    return result


# --- the world that a step sees, and little programs --------------------------------------------------------------


@dataclass
class World:
    """What the steps of one run share, and what they have noted; `ctx.resources` of each."""

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


def loop() -> asyncio.AbstractEventLoop:
    return asyncio.get_running_loop()


def a_future() -> asyncio.Future[Any]:
    return loop().create_future()


def settle(future: asyncio.Future[Any], result: Any) -> None:
    """Give a future its result or exception, unless it has been cancelled meanwhile."""
    if not future.done():
        if isinstance(result, Exception):
            future.set_exception(result)
        else:
            future.set_result(result)


class Yields:
    """An awaitable that yields any one thing to the Task, and says what came back."""

    def __init__(self, thing: Any) -> None:
        self.thing = thing

    def __await__(self) -> Generator[Any, Any, Any]:
        return (yield self.thing)


Acts = list[Any]


async def act_turn(scenery: Scenery) -> None:
    await asyncio.sleep(0)


async def act_future(scenery: Scenery) -> None:
    future = a_future()
    loop().call_soon(settle, future, "a result")
    scenery.note(await future)


async def act_failing_future(scenery: Scenery) -> None:
    future = a_future()
    loop().call_soon(settle, future, ValueError("a failure"))
    try:
        await future
    except ValueError as error:
        scenery.note(repr(error), repr(error.__context__))


async def act_event(scenery: Scenery) -> None:
    event = asyncio.Event()
    loop().call_soon(event.set)
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
                await turns(10)  # not for ever: Python 3.11 loses cancellations between nested groups
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
            timeout.reschedule(loop().time())
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
    loop().call_soon(me().cancel)
    await asyncio.sleep(60)


async def act_cancel_later(scenery: Scenery) -> None:
    handle = loop().call_later(0.001, me().cancel, "later")
    try:
        await asyncio.sleep(60)
    finally:
        handle.cancel()


async def act_set(scenery: Scenery, value: int) -> None:
    VARIABLE.set(value)


async def act_get(scenery: Scenery) -> None:
    scenery.note(VARIABLE.get())


async def act_reset_later(scenery: Scenery) -> None:
    """A token is good only in the context it was made in."""
    token = VARIABLE.set("for a while")
    await asyncio.sleep(0)
    scenery.note(VARIABLE.get())
    VARIABLE.reset(token)


async def act_get_in_callback(scenery: Scenery) -> None:
    future = a_future()
    loop().call_soon(lambda: settle(future, VARIABLE.get()))
    scenery.note(await future)


async def act_me(scenery: Scenery) -> None:
    scenery.note(me() is scenery.task, scenery.task in asyncio.all_tasks(), scenery.task.done(), me().cancelling())


async def act_callback(scenery: Scenery) -> None:
    def called(task: asyncio.Task[Any]) -> None:
        scenery.world.callbacks[scenery.id] += task.done()

    scenery.task.add_done_callback(called)


async def act_shield(scenery: Scenery) -> None:
    inner = asyncio.ensure_future(asyncio.sleep(0, "shielded"))
    loop().call_soon(me().cancel)
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
    """Neither an Exception nor one of Python's own."""


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
    return WRONG_ENDS[kind]()


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


# --- the same programs on the engine and on the oracle ------------------------------------------------------------


class Record(NamedTuple):
    """All that a run has left: the outcomes and the notes of each task, by its number."""

    outcomes: list[list[tuple[Any, ...]]]
    notes: list[list[str]]
    callbacks: list[int]


def described(error: BaseException | str) -> str:
    """An error's text without places and addresses; of pgtask's own errors only the class."""
    if isinstance(error, PgtaskError):
        return type(error).__name__
    lines = [re.sub(r" \(at [^()]* in [^()]*\)$", "", line) for line in describe(error).splitlines()]
    return "\n".join(re.sub(r"<.*>", "<>", line) for line in lines)


class Described(Dispatch):
    def describe(self, error: BaseException | str) -> str:
        return described(error)


def entries_of(outcomes: Outcomes) -> Iterator[reference.Entry]:
    for lease in outcomes.done:
        yield reference.Entry("done", lease.id)
    for lease, step in zip(outcomes.kept, outcomes.kept_steps, strict=True):
        yield reference.Entry("kept", lease.id, step=step)
    columns = zip(
        outcomes.moved,
        outcomes.moved_steps,
        outcomes.moved_tried,
        outcomes.moved_errors,
        outcomes.moved_delays,
        outcomes.moved_queues,
        outcomes.moved_priorities,
        outcomes.moved_claims,
        strict=True,
    )
    for lease, *rest in columns:
        yield reference.Entry("moved", lease.id, None, *rest)


class Stage(Dispatch):
    """The dispatcher under test, with its own lease table, and a `woken` to wait for as the pump does."""

    def __init__(
        self,
        app: App = PLAY,
        *,
        concurrency: int = 4,
        unknown: Callable[[str], float | None] = lambda name: 30.0,
        resources: Any = None,
    ) -> None:
        self.woken = asyncio.Event()
        self.broken: list[BaseException] = []
        self.held = Leases()
        super().__init__(
            Table(app),
            self.held,
            concurrency=concurrency,
            max_step_bytes=MAX_STEP_BYTES,
            wake=self.woken.set,
            unknown=unknown,
            broke=self._broke_down,
        )
        self.resources = resources
        self.app = app

    def _broke_down(self, error: BaseException) -> None:
        self.broken.append(error)
        self.woken.set()

    def claim(
        self, *steps: Task | str, tried: int = 0, claims: int = 1, size: int | None = None, id: UUID | None = None
    ) -> list[Lease]:
        """Leases for these steps, as if just claimed."""
        rows = []
        for step in steps:
            text = step if isinstance(step, str) else reference.encode(self.app.steps[type(step)], step)
            rows.append((id or uuid4(), text, tried, claims, size))
        return self.held.claimed(rows, uuid4(), 0.0)[0]

    async def next_outcomes(self) -> Outcomes:
        """Wait as the pump does, and take what has gathered."""
        while not len(self.outcomes):
            assert not self.broken, self.broken
            self.woken.clear()
            await self.woken.wait()
        return self.take()

    async def all_outcomes(self, leases: list[Lease]) -> list[reference.Entry]:
        """What comes of these leases until none is open; kept tasks go on."""
        entries: list[reference.Entry] = []
        while any(lease.is_open for lease in leases):
            outcomes = await self.next_outcomes()
            entries += entries_of(outcomes)
            self.go_on(outcomes.kept)
        return entries + list(entries_of(self.take()))


@contextmanager
def stage(*arguments: Any, **options: Any) -> Iterator[Stage]:
    made = Stage(*arguments, **options)
    try:
        yield made
    finally:
        made.close()


async def turns(number: int) -> None:
    for _ in range(number):
        await asyncio.sleep(0)


Row = tuple[UUID, str, int, int]  # id, step, tried, claims
CLAIMS = 6  # how often a task that was moved is claimed again


async def on_engine(texts: list[str], concurrency: int) -> Record:
    world, ids = World(), [uuid4() for _ in texts]
    leases = Leases()
    woken = asyncio.Event()
    broken: list[BaseException] = []
    dispatch = Described(
        Table(PLAY),
        leases,
        concurrency=concurrency,
        max_step_bytes=MAX_STEP_BYTES,
        wake=woken.set,
        unknown=lambda name: 30.0,
        broke=broken.append,
    )
    dispatch.resources = world

    def admit(rows: list[Row]) -> None:
        dispatch.admit(leases.claimed([(*row, None) for row in rows], uuid4(), 0.0)[0])

    def take() -> list[reference.Entry]:
        outcomes = dispatch.take()
        entries = list(entries_of(outcomes))
        for lease in outcomes.done + outcomes.moved:
            leases.remove(lease)
        dispatch.go_on(outcomes.kept)
        assert not broken
        assert dispatch.suspended <= concurrency
        return entries

    outcomes = await _pump(ids, texts, admit, take, woken)
    assert dispatch.suspended == len(leases) == len(dispatch.ready) == len(dispatch.outcomes) == 0
    dispatch.close()
    return _record(ids, outcomes, world)


async def on_oracle(texts: list[str], concurrency: int) -> Record:
    world, ids = World(), [uuid4() for _ in texts]
    woken = asyncio.Event()
    dispatch = reference.Dispatcher(PLAY, concurrency, MAX_STEP_BYTES, described, woken.set, world, is_connection_loss)
    leases: dict[UUID, reference.Lease] = {}

    def admit(rows: list[Row]) -> None:
        made = [reference.Lease(*row) for row in rows]
        leases.update({lease.id: lease for lease in made})
        dispatch.admit(made)

    def take() -> list[reference.Entry]:
        entries = dispatch.take()
        dispatch.go_on([leases[entry.id] for entry in entries if entry.kind == "kept"])
        return entries

    outcomes = await _pump(ids, texts, admit, take, woken)
    return _record(ids, outcomes, world)


async def _pump(
    ids: list[UUID],
    texts: list[str],
    admit: Callable[[list[Row]], None],
    take: Callable[[], list[reference.Entry]],
    woken: asyncio.Event,
) -> dict[UUID, list[reference.Entry]]:
    """As the worker does: wait to be woken, take what has gathered, claim again what was moved."""
    rows = {id: (id, text, 0, 1) for id, text in zip(ids, texts, strict=True)}
    outcomes: dict[UUID, list[reference.Entry]] = collections.defaultdict(list)
    claims = dict.fromkeys(ids, CLAIMS)
    open_ids = set(ids)
    admit(list(rows.values()))
    while True:
        woken.clear()
        entries = take()
        for entry in entries:
            id, text, tried, _ = rows[entry.id]
            outcomes[id].append(entry)
            again = entry.kind == "kept" or (entry.kind == "moved" and entry.error is None)
            tried = entry.tried if entry.tried is not None else tried
            rows[id] = id, entry.step or text, tried, 1 + (entry.claims or 0)
            claims[id] -= entry.kind == "moved"
            if not again or not claims[id]:
                open_ids.discard(id)
            elif entry.kind == "moved":
                admit([rows[id]])
        if not open_ids:
            break
        if not entries:
            await woken.wait()
    await turns(3)  # for the callbacks of the last Tasks
    return outcomes


def _record(ids: list[UUID], outcomes: dict[UUID, list[reference.Entry]], world: World) -> Record:
    return Record(
        [
            [
                (
                    entry.kind,
                    entry.step and msgspec.json.decode(entry.step),
                    entry.tried,
                    entry.error,
                    entry.delay,
                    entry.queue,
                    entry.priority,
                    entry.claims,
                )
                for entry in outcomes[id]
            ]
            for id in ids
        ],
        [world.notes[id] for id in ids],
        [world.callbacks[id] for id in ids],
    )


PHASES = tuple(set(Phase) - {Phase.explain})  # explaining takes a minute here


def _alone(*names: str) -> st.SearchStrategy[Any]:
    return st.sampled_from(names).map(lambda name: [name])


UNTIMED = st.one_of(
    _alone("turn", "future", "failing_future", "event", "get", "me", "callback", "keep", "cancel_kept", "exc_info"),
    _alone("reset_later", "get_in_callback", "shield", "generator", "handle", "cancel_self", "cancel_soon"),
    _alone("group_fails_at_once", "keep_weakly", "take_back", "rename"),
    st.integers(0, 9).map(lambda value: ["set", value]),
    st.sampled_from(["none", "number", "future", "me"]).map(lambda what: ["odd", what]),
)
TIMED = UNTIMED | _alone("wait_for", "cancel_later", "timer")


def _acts(simple: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    return st.recursive(
        st.lists(simple, max_size=4),
        lambda inner: st.lists(
            st.one_of(
                simple,
                st.tuples(st.sampled_from(["spawn", "timeout", "timeout_in_time", "catch"]), inner).map(list),
                st.tuples(st.just("group"), st.booleans(), inner).map(list),
                st.lists(inner, max_size=3).map(lambda many: ["gather", *many]),
            ),
            max_size=4,
        ),
        max_leaves=4,
    )


LAST = st.one_of(
    _alone("done", "done", "fail", "raise from", "raise while", *WRONG_ENDS),
    st.sampled_from(sorted(ERRORS)).map(lambda name: ["raise", name]),
)
ON = st.sampled_from(["next", "later", "at once", "elsewhere", "urgent"])


def _programs(acts: st.SearchStrategy[Any], *classes: str) -> st.SearchStrategy[list[str]]:
    ends = st.recursive(LAST, lambda inner: st.tuples(ON, acts, inner).map(list), max_leaves=3)
    one = st.tuples(st.sampled_from(classes), acts, ends).map(
        lambda parts: msgspec.json.encode({"Play": {parts[0]: {"acts": parts[1], "end": parts[2]}}}).decode()
    )
    broken = st.sampled_from(
        ["{", '{"Play":{"Scene":{"acts":5}}}', '{"Play":{"Nothing":null}}', '{"Game":{"Scene":1}}']
    )
    return st.lists(one | one | one | one | one | broken, min_size=1, max_size=5)


@settings(deadline=None, max_examples=150, phases=PHASES)
@given(_programs(_acts(TIMED), "Scene", "Urgent", "Hurried"), st.integers(1, 3))
def test_programs_go_on_the_engine_as_in_tasks_of_their_own(programs: list[str], concurrency: int) -> None:
    assert play("asyncio", on_engine(programs, concurrency)) == play("asyncio", on_oracle(programs, concurrency))


@settings(deadline=None, max_examples=50, phases=PHASES)
@given(_programs(_acts(UNTIMED), "Scene", "Urgent"), st.integers(1, 3))
def test_programs_go_on_uvloop_as_in_tasks_of_their_own(programs: list[str], concurrency: int) -> None:
    assert play("uvloop", on_engine(programs, concurrency)) == play("uvloop", on_oracle(programs, concurrency))


# --- each promise by itself ---------------------------------------------------------------------------------------


class Script(Task):
    """A step that runs a function of the test, found by name in `ctx.resources`."""


class Act(Script):
    name: str

    async def run(self, ctx: Context) -> Next[Act | Timed | Moved] | Done | Fail:
        return await ctx.resources[self.name](ctx)


class Timed(Script):
    policy = Policy(timeout=timedelta(milliseconds=5), retry_limit=1)
    name: str

    async def run(self, ctx: Context) -> Next[Act | Timed] | Done | Fail:
        return await ctx.resources[self.name](ctx)


class Moved(Script):
    policy = Policy(queue="other", priority=5)
    name: str

    async def run(self, ctx: Context) -> Next[Act] | Done:
        return await ctx.resources[self.name](ctx)


class Threaded(Script):
    name: str

    def run(self, ctx: Context) -> Next[Act] | Done | Fail:
        return ctx.resources[self.name](ctx)


class ThreadedTimed(Script):
    policy = Policy(timeout=timedelta(milliseconds=5))
    name: str

    def run(self, ctx: Context) -> Next[Act] | Done | Fail:
        return ctx.resources[self.name](ctx)


SCRIPT = App(Script)
Run = Callable[[Context], Awaitable[Any]]


class Scripts(dict[str, Any]):
    """The functions that steps run; the one of this class are always there."""

    def __init__(self, **runs: Any) -> None:
        super().__init__(done=self.done, waits=self.waits, **runs)
        self.gate = asyncio.Event()
        self.waiting = 0
        self.most_waiting = 0
        self.cancelled = 0

    async def done(self, ctx: Context) -> Done:
        return Done()

    async def waits(self, ctx: Context) -> Done:
        """Wait for the gate, and count how many do."""
        self.waiting += 1
        self.most_waiting = max(self.waiting, self.most_waiting)
        try:
            await self.gate.wait()
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        finally:
            self.waiting -= 1
        return Done()


@contextmanager
def scripted(*, concurrency: int = 4, **runs: Any) -> Iterator[tuple[Stage, Scripts]]:
    scripts = Scripts(**runs)
    with stage(SCRIPT, concurrency=concurrency, resources=scripts) as made:
        yield made, scripts


def outcomes_of(clock: Clock, *names: str, concurrency: int = 4, **runs: Run) -> list[reference.Entry]:
    """What comes of these steps, each the name of one of `runs`."""

    async def main() -> list[reference.Entry]:
        with scripted(concurrency=concurrency, **runs) as (dispatch, _):
            leases = dispatch.claim(*(Act(name) for name in names))
            dispatch.admit(leases)
            entries = await dispatch.all_outcomes(leases)
            by_id = {lease.id: number for number, lease in enumerate(leases)}
            return sorted(entries, key=lambda entry: by_id[entry.id])

    return play(clock, main())


async def suspended(ctx: Context) -> Done:
    """A step that is suspended for some turns, and would be hurt by a stray cancellation."""
    await turns(3)
    return Done()


def test_steps_that_do_not_suspend_share_a_task(clock: Clock) -> None:
    seen = set()

    async def looks(ctx: Context) -> Done:
        seen.add(me().get_name())
        return Done()

    assert {entry.kind for entry in outcomes_of(clock, *["looks"] * 50, looks=looks)} == {"done"}
    assert len(seen) < 10  # one for each slice of 5 ms


def test_a_step_has_its_task_for_itself_from_its_start_to_its_end(clock: Clock) -> None:
    seen: list[tuple[asyncio.Task[Any], asyncio.Task[Any]]] = []

    async def looks(ctx: Context) -> Done:
        before = me()
        await asyncio.sleep(0)
        seen.append((before, me()))
        return Done()

    outcomes_of(clock, *["looks"] * 5, looks=looks)
    assert all(before is after for before, after in seen)
    assert len({id(task) for task, _ in seen}) == 5
    assert all(task.done() for task, _ in seen)


def test_the_stack_of_a_suspended_step_can_be_seen(clock: Clock) -> None:
    async def main() -> None:
        with scripted() as (dispatch, scripts):
            leases = dispatch.claim(Act("waits"))
            dispatch.admit(leases)
            await turns(2)
            (task,) = asyncio.all_tasks() - {asyncio.current_task()}
            assert [frame.f_code.co_qualname for frame in task.get_stack()] == ["Act.run"]
            scripts.gate.set()
            await dispatch.all_outcomes(leases)

    play(clock, main())


# What a step may do to its Task; it has ended when the next one starts, which would share its Task.


def leaves_a_reference(kept: list[Any]) -> None:
    kept.append(me())


def leaves_a_weak_reference(kept: list[Any]) -> None:
    kept.append(weakref.ref(me()))


def leaves_a_weak_key(kept: list[Any]) -> None:
    kept.append(weakref.WeakKeyDictionary({me(): "state of the first step"}))


def leaves_a_handle(kept: list[Any]) -> None:
    loop().call_soon(me().cancel)


def leaves_a_timer(kept: list[Any]) -> None:
    loop().call_later(0, me().cancel)


def cancels(kept: list[Any]) -> None:
    me().cancel()


def cancels_and_takes_it_back(kept: list[Any]) -> None:
    me().cancel()
    me().uncancel()


def names_it(kept: list[Any]) -> None:
    me().set_name("named by the first step")


def adds_a_callback(kept: list[Any]) -> None:
    me().add_done_callback(kept.append)


TRACES = [
    leaves_a_reference,
    leaves_a_weak_reference,
    leaves_a_weak_key,
    leaves_a_handle,
    leaves_a_timer,
    cancels,
    cancels_and_takes_it_back,
    names_it,
    adds_a_callback,
]


@pytest.mark.parametrize("suspends_before", [False, True])
@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("leave", TRACES)
def test_what_a_step_does_to_its_task_is_over_when_it_ends(
    clock: Clock, leave: Callable[[list[Any]], None], fails: bool, suspends_before: bool
) -> None:
    kept: list[Any] = []
    ended = []

    async def first(ctx: Context) -> Done:
        if suspends_before:
            await asyncio.sleep(0)
        leave(kept)
        if fails:
            raise ValueError
        return Done()

    async def later(ctx: Context) -> Done:
        assert me().get_name() != "named by the first step"
        assert me().cancelling() == 0
        for thing in kept:
            if isinstance(thing, weakref.WeakKeyDictionary):
                assert me() not in thing
                continue
            task = thing() if isinstance(thing, weakref.ref) else thing
            assert task is not me()
            if task is not None:
                task.cancel()
        await suspended(ctx)
        ended.append(ctx.task_id)
        return Done()

    entries = outcomes_of(clock, "first", "later", "later", "done", concurrency=1, first=first, later=later)
    assert [(entry.kind, entry.error) for entry in entries[1:]] == [("done", None)] * 3
    assert len(ended) == 2


def test_a_callback_on_the_task_is_called_when_the_step_ends(clock: Clock) -> None:
    async def main() -> None:
        called = asyncio.Event()

        async def first(ctx: Context) -> Done:
            me().add_done_callback(lambda task: called.set())
            return Done()

        async def later(ctx: Context) -> Done:
            async with asyncio.timeout(1):
                await called.wait()
            return Done()

        with scripted(first=first, later=later) as (dispatch, _):
            leases = dispatch.claim(Act("first"), Act("later"))
            dispatch.admit(leases)
            assert [entry.kind for entry in await dispatch.all_outcomes(leases)] == ["done", "done"]

    play(clock, main())


@pytest.mark.skipif(not hasattr(asyncio, "eager_task_factory"), reason="eager tasks came with Python 3.12")
def test_eager_tasks_do_not_disturb_the_engine() -> None:
    async def main() -> None:
        loop().set_task_factory(getattr(asyncio, "eager_task_factory"))  # noqa: B009

        async def spawns(ctx: Context) -> Done:
            async with asyncio.TaskGroup() as group:
                group.create_task(asyncio.sleep(0))
                group.create_task(suspended(ctx))
            return Done()

        async def fails(ctx: Context) -> Done:
            async def at_once() -> None:
                raise ValueError

            async with asyncio.TaskGroup() as group:  # ends, cancelled and uncancelled, without suspending
                group.create_task(at_once())
            return Done()

        names = ["done", "spawns", "fails", "suspended"] * 5
        with scripted(concurrency=2, spawns=spawns, suspended=suspended, fails=fails) as (dispatch, _):
            leases = dispatch.claim(*map(Act, names))
            dispatch.admit(leases)
            entries = await dispatch.all_outcomes(leases)
        kinds = {entry.id: (entry.kind, entry.error is None) for entry in entries}
        expected = {"fails": ("moved", False)}
        assert [kinds[lease.id] for lease in leases] == [expected.get(name, ("done", True)) for name in names]

    play("asyncio", main())


def test_the_engine_runs_in_debug_mode(clock: Clock) -> None:
    async def main() -> None:
        with scripted(suspended=suspended) as (dispatch, _):
            leases = dispatch.claim(*[Act("done"), Act("suspended")] * 5)
            dispatch.admit(leases)
            assert {entry.kind for entry in await dispatch.all_outcomes(leases)} == {"done"}

    play(clock, main(), debug=True)


def test_steps_see_what_the_lifespan_has_set(clock: Clock) -> None:
    """The dispatcher is made before the lifespan is entered, and takes leases after."""

    async def main() -> None:
        seen = []

        async def looks(ctx: Context) -> Done:
            seen.append(VARIABLE.get())
            await asyncio.sleep(0)
            return Done()

        def looks_in_thread(ctx: Context) -> Done:
            seen.append(VARIABLE.get())
            return Done()

        with scripted(concurrency=1, looks=looks, looks_in_thread=looks_in_thread) as (dispatch, _):
            VARIABLE.set("by the lifespan")
            leases = dispatch.claim(Act("looks"), Threaded("looks_in_thread"), Act("looks"))
            dispatch.admit(leases)
            await dispatch.all_outcomes(leases)
        assert seen == ["by the lifespan"] * 3

    play(clock, main())


def test_each_step_has_a_context_of_its_own_made_from_the_workers(clock: Clock) -> None:
    async def main() -> None:
        VARIABLE.set("of the worker")
        seen = []

        async def sets(ctx: Context) -> Next[Act]:
            seen.append(VARIABLE.get())
            VARIABLE.set("of a step")
            await asyncio.sleep(0)
            seen.append(VARIABLE.get())
            return Next(Act("looks"))

        async def looks(ctx: Context) -> Done:
            seen.append(VARIABLE.get())
            VARIABLE.set("of a step that does not suspend")
            return Done()

        def in_thread(ctx: Context) -> Done:
            seen.append(VARIABLE.get())
            VARIABLE.set("of a thread")
            return Done()

        runs = {"sets": sets, "looks": looks, "in_thread": in_thread}
        with scripted(concurrency=1, **runs) as (dispatch, _):
            leases = dispatch.claim(
                Act("looks"), Threaded("in_thread"), Act("looks"), Act("sets"), Threaded("in_thread"), Act("looks")
            )
            dispatch.admit(leases)
            await dispatch.all_outcomes(leases)
        assert collections.Counter(seen) == {"of the worker": 7, "of a step": 1}
        assert VARIABLE.get() == "of the worker"

    play(clock, main())


class NoRepr:
    def __repr__(self) -> str:
        raise ValueError("no repr")


@pytest.mark.parametrize("wrong", [NoRepr(), Fail(NoRepr())], ids=["outcome", "reason"])  # type: ignore[arg-type]
@pytest.mark.parametrize("suspends", [False, True])
def test_an_outcome_without_a_repr_harms_only_its_own_task(clock: Clock, wrong: Any, suspends: bool) -> None:
    async def returns(ctx: Context) -> Any:
        await turns(suspends)
        return wrong

    first, *others = outcomes_of(clock, "returns", "done", "suspended", returns=returns, suspended=suspended)
    assert first.kind == "moved"
    assert first.error is not None
    assert first.error.startswith("Script.Act")
    assert [entry.kind for entry in others] == ["done", "done"]


class ExitsWhenAsked(Exception):
    def __str__(self) -> str:
        raise SystemExit(3)


def test_an_outcome_without_a_repr_is_not_lost_when_the_step_was_cancelled(clock: Clock) -> None:
    async def returns(ctx: Context) -> Any:
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            return NoRepr()

    async def main() -> None:
        with scripted(returns=returns) as (dispatch, _):
            leases = dispatch.claim(Timed("returns"), tried=1)
            dispatch.admit(leases)
            (entry,) = await dispatch.all_outcomes(leases)
            assert (entry.error or "").startswith("Script.Timed returned ")

    play(clock, main())


def test_an_error_whose_text_exits_harms_only_its_own_task(clock: Clock) -> None:
    async def raises(ctx: Context) -> Any:
        raise ExitsWhenAsked

    first, second = outcomes_of(clock, "raises", "done", raises=raises)
    assert first.error is not None
    assert first.error.startswith("test_driving.ExitsWhenAsked: ")
    assert second.kind == "done"


def test_a_reason_that_is_a_kind_of_text_is_text(clock: Clock) -> None:
    class Reason(str):
        """As of an `enum.StrEnum`."""

    async def fails(ctx: Context) -> Fail:
        return Fail(Reason("no money"))

    (entry,) = outcomes_of(clock, "fails", fails=fails)
    assert entry.error == "no money"


@pytest.mark.parametrize(
    ("end", "text"),
    [
        ("nothing", "Play.Scene returned None: a return is missing; return Next(...), Done() or Fail(...)"),
        ("number", "Play.Scene returned 5; return Next(...), Done() or Fail(...)"),
        ("undeclared", "Play.Scene returned Next(Undeclared), but its annotation allows Elsewhere, Scene, Urgent"),
        ("next of nothing", "Play.Scene returned Next(NoneType), but its annotation allows"),
        ("too large", f"the next step Play.Scene is 10047 bytes, more than the {MAX_STEP_BYTES} allowed"),
        ("not encodable", "the next step Play.Scene cannot be stored: Encoding objects of type object is unsupported"),
        ("wrong field", "the next step Play.Scene cannot be decoded: Expected `array`, got `int` - at `$.acts`"),
        ("next of a class", "Play.Scene: Scene is a class: write Next(Scene(...))"),
        ("delay as a number", "Next(after=5): use a timedelta, zero or more"),
        ("fail without text", "Play.Scene: Fail() takes a reason as text, not 5"),
        ("negative delay", "Next(after="),
    ],
)
def test_what_is_wrong_with_an_outcome_is_said(end: str, text: str) -> None:
    async def main() -> None:
        with stage(resources=World()) as dispatch:
            leases = dispatch.claim(Scene([], [end]), tried=1)
            dispatch.admit(leases)
            (entry,) = await dispatch.all_outcomes(leases)
            assert entry.error is not None
            assert entry.error.startswith(text)
            assert entry.error.count("got `int`") == text.count("got `int`"), "said once"
            assert entry.tried == 2

    play("asyncio", main())


# --- bounds -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("concurrency", [1, 3])
def test_no_more_than_concurrency_are_suspended(clock: Clock, concurrency: int) -> None:
    async def main() -> None:
        with scripted(concurrency=concurrency) as (dispatch, scripts):
            leases = dispatch.claim(*[Act("waits")] * 20)
            dispatch.admit(leases)
            await turns(50)
            assert (dispatch.suspended, scripts.waiting) == (concurrency, concurrency)
            assert len(dispatch.ready) == 20 - concurrency
            scripts.gate.set()
            assert len(await dispatch.all_outcomes(leases)) == 20
            assert scripts.most_waiting == concurrency
            assert dispatch.suspended == 0

    play(clock, main())


def test_steps_that_do_not_suspend_pass_a_suspended_one(clock: Clock) -> None:
    async def main() -> None:
        with scripted(concurrency=2) as (dispatch, scripts):
            (waits,) = dispatch.claim(Act("waits"))
            others = dispatch.claim(*[Act("done")] * 20)
            dispatch.admit([waits, *others])
            assert len(await dispatch.all_outcomes(others)) == 20
            assert waits.is_open
            scripts.gate.set()
            await dispatch.all_outcomes([waits])

    play(clock, main())


def test_steps_that_do_not_suspend_give_the_loop_its_turns(clock: Clock) -> None:
    async def main() -> int:
        async def works(ctx: Context) -> Done:
            until = time.perf_counter() + 0.002
            while time.perf_counter() < until:
                pass
            return Done()

        with scripted(works=works) as (dispatch, _):
            leases = dispatch.claim(*[Act("works")] * 40)
            dispatch.admit(leases)
            count = 0
            while any(lease.is_open for lease in leases):
                await asyncio.sleep(0)
                count += 1
            assert len(dispatch.take().done) == 40
            return count

    # 80 ms in slices of 5 ms, each of which ends at most one step of 2 ms too late.
    assert play(clock, main()) >= 11


@pytest.mark.parametrize("then_suspends", [False, True])
def test_many_runners_share_the_slice_of_a_turn(clock: Clock, then_suspends: bool) -> None:
    """Steps that await make runners many; each of these starting a step that computes would hold the loop for long."""

    async def main() -> list[int]:
        turn = 0
        started: list[int] = []

        async def works(ctx: Context) -> Done:
            started.append(turn)
            until = time.perf_counter() + 0.006
            while time.perf_counter() < until:
                pass
            if then_suspends:
                await asyncio.sleep(0)
            return Done()

        with scripted(concurrency=50, suspended=suspended, works=works) as (dispatch, _):
            leases = dispatch.claim(*[Act("suspended")] * 100, *[Act("works")] * 20)
            dispatch.admit(leases)
            while any(lease.is_open for lease in leases):
                await asyncio.sleep(0)
                turn += 1
            assert len(dispatch.take().done) == 120
        return started

    started = play(clock, main())
    assert len(started) == 20
    # One step of 6 ms is more than a slice: no other in its turn of the loop, of which ours may begin in the middle.
    assert max(map(started.count, started)) <= 2


def test_a_task_queues_up_again_after_a_hundred_moves(clock: Clock) -> None:
    async def main() -> None:
        async def goes_on(ctx: Context) -> Next[Act]:
            return Next(Act("goes_on"))

        with scripted(goes_on=goes_on) as (dispatch, _):
            leases = dispatch.claim(Act("goes_on"), tried=3)
            dispatch.admit(leases)
            *kept, last = await dispatch.all_outcomes(leases)
            assert [entry.kind for entry in kept] == ["kept"] * reference.MOST_MOVES
            assert (last.kind, last.step, last.tried) == ("moved", '{"Script":{"Act":{"name":"goes_on"}}}', 0)
            assert (last.error, last.delay, last.queue, last.priority) == (None, 0.0, None, None)
            assert dispatch.steps == reference.MOST_MOVES + 1

    play(clock, main())


def test_while_draining_a_task_that_goes_on_leaves(clock: Clock) -> None:
    async def goes_on(ctx: Context) -> Next[Act]:
        return Next(Act("done"))

    async def main() -> None:
        with scripted(goes_on=goes_on) as (dispatch, _):
            dispatch.draining = True
            leases = dispatch.claim(Act("goes_on"))
            dispatch.admit(leases)
            (entry,) = await dispatch.all_outcomes(leases)
            assert (entry.kind, entry.step) == ("moved", '{"Script":{"Act":{"name":"done"}}}')
            assert (entry.tried, entry.error, entry.delay) == (0, None, 0.0)

    play(clock, main())


def test_a_policy_of_another_queue_or_priority_moves_the_task(clock: Clock) -> None:
    async def to_other(ctx: Context) -> Next[Moved]:
        return Next(Moved("back"))

    async def back(ctx: Context) -> Next[Act]:
        return Next(Act("done"), after=timedelta(seconds=2))

    async def main() -> None:
        with scripted(to_other=to_other, back=back) as (dispatch, _):
            leases = dispatch.claim(Act("to_other"), Moved("back"))
            dispatch.admit(leases)
            outcomes = await dispatch.next_outcomes()
            assert outcomes.notify
            there, back_again = entries_of(outcomes)
            assert (there.queue, there.priority, there.delay) == ("other", 5, 0.0)
            assert (back_again.queue, back_again.priority, back_again.delay) == ("default", 0, 2.0)

    play(clock, main())


# --- timeouts, loss and stop --------------------------------------------------------------------------------------


def test_a_timeout_cancels_the_step_and_counts_as_a_failed_try(clock: Clock) -> None:
    async def main() -> None:
        with scripted() as (dispatch, scripts):
            first, second = [dispatch.claim(Timed("waits"), tried=tried)[0] for tried in (0, 1)]
            dispatch.admit([first, second])
            retried, parked = await dispatch.all_outcomes([first, second])
            assert (retried.id, retried.tried, retried.error, retried.delay) == (first.id, 1, None, 1.0)
            assert (parked.id, parked.tried) == (second.id, 2)
            text = "Script.Timed ran longer than its timeout of 0.005 s"
            assert parked.error == text
            assert scripts.cancelled == 2
            assert (dispatch.errors, dispatch.suspended) == (2, 0)

    play(clock, main())


def test_a_step_that_ends_in_time_is_not_cancelled_later() -> None:
    async def main() -> None:
        with scripted(concurrency=1, suspended=suspended) as (dispatch, _):
            leases = dispatch.claim(Timed("suspended"), Act("sleeps"))
            dispatch.resources["sleeps"] = lambda ctx: asyncio.sleep(0.02, Done())
            dispatch.admit(leases)
            assert [entry.kind for entry in await dispatch.all_outcomes(leases)] == ["done", "done"]

    play("asyncio", main())


def test_the_time_of_a_step_is_not_the_next_steps() -> None:
    async def goes_on(ctx: Context) -> Next[Act]:
        await asyncio.sleep(0)
        return Next(Act("sleeps"))

    async def sleeps(ctx: Context) -> Done:
        await asyncio.sleep(0.02)
        return Done()

    async def main() -> None:
        with scripted(goes_on=goes_on, sleeps=sleeps) as (dispatch, _):
            leases = dispatch.claim(Timed("goes_on"))
            dispatch.admit(leases)
            assert [entry.kind for entry in await dispatch.all_outcomes(leases)] == ["kept", "done"]

    play("asyncio", main())


def test_what_a_timed_out_step_says_while_it_cleans_up_counts(clock: Clock) -> None:
    async def insists(ctx: Context) -> Done:
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            return Done()
        raise AssertionError

    async def breaks(ctx: Context) -> Done:
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            raise ValueError("while cleaning up") from None
        raise AssertionError

    async def main() -> None:
        with scripted(insists=insists, breaks=breaks) as (dispatch, _):
            (first,), (second,) = dispatch.claim(Timed("insists")), dispatch.claim(Timed("breaks"), tried=5)
            dispatch.admit([first, second])
            entries = {entry.id: entry for entry in await dispatch.all_outcomes([first, second])}
            assert entries[first.id].kind == "done"
            assert (entries[second.id].error or "").startswith("ValueError: while cleaning up")

    play(clock, main())


def test_a_timeout_that_was_survived_is_not_the_next_steps(clock: Clock) -> None:
    async def survives(ctx: Context) -> Next[Act]:
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            return Next(Act("cancels_itself"))
        raise AssertionError

    async def cancels_itself(ctx: Context) -> Done:
        raise asyncio.CancelledError

    async def main() -> None:
        with scripted(survives=survives, cancels_itself=cancels_itself) as (dispatch, _):
            leases = dispatch.claim(Timed("survives"))
            dispatch.admit(leases)
            kept, parked = await dispatch.all_outcomes(leases)
            assert kept.kind == "kept"
            text = "Script.Act was cancelled from within: it raised CancelledError"
            assert parked.error == text

    play(clock, main())


def test_a_lost_lease_is_not_started(clock: Clock) -> None:
    async def main() -> None:
        with scripted(concurrency=1) as (dispatch, scripts):
            leases = dispatch.claim(Act("waits"), Act("done"), Act("done"))
            dispatch.admit(leases)
            await turns(2)
            dispatch.lose(leases[1])
            assert dispatch.held.get(leases[1].id) is None
            assert not leases[1].is_open
            scripts.gate.set()
            entries = await dispatch.all_outcomes(leases)
            assert [entry.id for entry in entries] == [leases[0].id, leases[2].id]
            assert dispatch.steps == 2

    play(clock, main())


@pytest.mark.parametrize("how", ["is cancelled", "swallows it", "raises another"])
def test_a_lost_step_is_cancelled_and_its_outcome_dropped(clock: Clock, how: str) -> None:
    async def lasts(ctx: Context) -> Next[Act]:
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            if how == "is cancelled":
                raise
            if how == "raises another":
                raise ValueError from None
        return Next(Act("done"))

    async def main() -> None:
        with scripted(concurrency=1, lasts=lasts) as (dispatch, _):
            lost, other = leases = dispatch.claim(Act("lasts"), Act("done"))
            dispatch.admit(leases)
            await turns(2)
            dispatch.lose(lost)
            assert [entry.id for entry in await dispatch.all_outcomes(leases)] == [other.id]
            assert (dispatch.suspended, dispatch.errors) == (0, 0)
            assert len(dispatch.held) == 1

    play(clock, main())


def test_a_lease_lost_after_its_step_ended_does_not_go_on(clock: Clock) -> None:
    async def goes_on(ctx: Context) -> Next[Act]:
        return Next(Act("done"))

    async def main() -> None:
        with scripted(goes_on=goes_on) as (dispatch, _):
            (lease,) = dispatch.claim(Act("goes_on"))
            dispatch.admit([lease])
            outcomes = await dispatch.next_outcomes()
            dispatch.lose(lease)
            dispatch.go_on(outcomes.kept)
            await turns(5)
            assert (dispatch.steps, len(dispatch.outcomes), len(dispatch.ready)) == (1, 0, 0)

    play(clock, main())


def test_a_stopped_step_is_given_back_as_it_was() -> None:
    async def main() -> None:
        with scripted(concurrency=2) as (dispatch, scripts):
            leases = dispatch.claim(Act("waits"), Timed("waits"), Act("done"), tried=2)
            running, hurried, ready = leases
            dispatch.admit(leases)
            await turns(3)
            dispatch.stop(running)
            dispatch.stop(hurried)
            dispatch.stop(ready)
            await turns(3)
            assert scripts.cancelled == 2
            outcomes = dispatch.take()
            assert [lease.id for lease in outcomes.done] == [ready.id]  # it had not started, so it was not stopped
            assert not outcomes.moved
            assert dispatch.held.open() == [running, hurried]
            assert [lease.tried for lease in (running, hurried)] == [2, 2]
            assert (dispatch.suspended, dispatch.errors, len(dispatch.ready)) == (0, 0, 0)

    play("asyncio", main())


@pytest.mark.parametrize("end", ["lose", "stop"])
def test_the_end_of_a_step_without_an_outcome_is_told(clock: Clock, end: str) -> None:
    async def main() -> None:
        with scripted() as (dispatch, _):
            (lease,) = dispatch.claim(Act("waits"))
            dispatch.admit([lease])
            await turns(2)
            dispatch.woken.clear()
            getattr(dispatch, end)(lease)
            async with asyncio.timeout(1):
                await dispatch.woken.wait()
            assert (dispatch.suspended, len(dispatch.outcomes)) == (0, 0)

    play(clock, main())


def test_a_stopped_step_may_still_end_well(clock: Clock) -> None:
    async def finishes(ctx: Context) -> Done:
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            await asyncio.sleep(0)
            return Done()
        raise AssertionError

    async def main() -> None:
        with scripted(finishes=finishes) as (dispatch, _):
            leases = dispatch.claim(Act("finishes"))
            dispatch.admit(leases)
            await turns(2)
            dispatch.stop(leases[0])
            assert [entry.kind for entry in await dispatch.all_outcomes(leases)] == ["done"]

    play(clock, main())


def test_what_has_not_started_can_be_taken_back(clock: Clock) -> None:
    async def main() -> None:
        with scripted(concurrency=1) as (dispatch, scripts):
            leases = dispatch.claim(*[Act("waits")] * 4)
            dispatch.admit(leases)
            await turns(2)
            dispatch.lose(leases[2])
            assert dispatch.take_ready() == [leases[1], leases[3]]
            assert not dispatch.ready
            assert dispatch.take_ready() == []
            scripts.gate.set()
            assert len(await dispatch.all_outcomes(leases[:1])) == 1

    play(clock, main())


# --- tries and claims ---------------------------------------------------------------------------------------------


async def raises_value_error(ctx: Context) -> Done:
    raise ValueError(f"attempt {ctx.attempt}")


async def loses_its_connection(ctx: Context) -> Done:
    raise asyncpg.ConnectionDoesNotExistError("connection was closed in the middle of operation")


def test_the_next_step_starts_with_fresh_counts(clock: Clock) -> None:
    """Failed tries, and claims without an outcome, belong to a step, and not to the task."""

    async def fails_next(ctx: Context) -> Next[Timed]:
        return Next(Timed("raises"))

    async def interrupted_next(ctx: Context) -> Next[Act]:
        return Next(Act("loses"))

    runs: dict[str, Any] = {"raises": raises_value_error, "loses": loses_its_connection}

    async def main() -> None:
        with scripted(fails_next=fails_next, interrupted_next=interrupted_next, **runs) as (dispatch, _):
            leases = dispatch.claim(Act("fails_next"), Act("interrupted_next"), tried=3, claims=9)
            dispatch.admit(leases)
            entries = [entry for entry in await dispatch.all_outcomes(leases) if entry.kind == "moved"]
            failed, interrupted = sorted(entries, key=lambda entry: entry.id != leases[0].id)
            assert (failed.tried, failed.error, failed.claims) == (1, None, None)  # the first of two tries
            assert (interrupted.tried, interrupted.error, interrupted.claims) == (None, None, 0)

    play(clock, main())


def test_a_step_whose_connection_is_lost_is_not_to_blame_at_first(clock: Clock) -> None:
    async def main() -> None:
        with scripted(loses=loses_its_connection) as (dispatch, _):
            entries = []
            for _ in range(5):  # of one task that was in two crashes before: they stay on its account
                leases = dispatch.claim(Act("loses"), tried=2, claims=3, id=UUID(int=1))
                dispatch.admit(leases)
                entries += await dispatch.all_outcomes(leases)
            *excused, fifth = entries
            for entry in excused:
                assert (entry.tried, entry.error, entry.delay, entry.claims) == (None, None, 1.0, 2)
            assert (fifth.tried, fifth.claims) == (3, None)
            assert "ConnectionDoesNotExistError" in (fifth.error or "")
            assert dispatch.errors == 1

    play(clock, main())


# --- rows that cannot be run --------------------------------------------------------------------------------------


def test_rows_that_cannot_be_run_are_put_back_or_parked(clock: Clock) -> None:
    async def main() -> None:
        asked = []

        def unknown(name: str) -> float | None:
            asked.append(name)
            return None if name == "Script.Gone" else 30.0

        with stage(SCRIPT, unknown=unknown, resources=Scripts()) as dispatch:
            leases = dispatch.claim(
                '{"Script":{"New":{}}}', '{"Script":{"Gone":null}}', '{"Script":{"Act":{}}}', "{", Act("done"), tried=4
            )
            leases += dispatch.claim("", size=20_000)
            dispatch.admit(leases)
            entries = {entry.id: entry for entry in await dispatch.all_outcomes(leases)}
            new, gone, wrong, broken, good, large = (entries[lease.id] for lease in leases)
            assert asked == ["Script.New", "Script.Gone"]
            assert (new.kind, new.tried, new.error, new.delay) == ("moved", None, None, 30.0)
            assert (gone.error or "").startswith("unknown step Script.Gone")
            assert "Script.Act cannot be decoded: Object missing required field `name`" in (wrong.error or "")
            assert "the step is not valid JSON" in (broken.error or "")
            assert f"20000 bytes, more than the {MAX_STEP_BYTES} allowed" in (large.error or "")
            for entry in (gone, wrong, broken, large):
                assert (entry.kind, entry.step, entry.tried, entry.delay) == ("moved", None, None, 0.0)
            assert good.kind == "done"
            assert (dispatch.steps, dispatch.errors) == (1, 4)
            assert dispatch.suspended == 0

    play(clock, main())


# --- steps in threads ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("raised", "text"),
    [
        (ValueError("wrong"), "ValueError: wrong"),
        (StopIteration(5), "StopIteration: 5"),
        (SystemExit(3), "SystemExit: 3"),
        (KeyboardInterrupt(), "KeyboardInterrupt (at"),
        (GeneratorExit(), "GeneratorExit (at"),
        (asyncio.CancelledError(), "Script.Threaded was cancelled from within"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_an_error_in_a_thread_is_the_steps(clock: Clock, raised: BaseException, text: str) -> None:
    def raises(ctx: Context) -> Done:
        raise raised

    async def main() -> None:
        with scripted(raises=raises) as (dispatch, _):
            leases = dispatch.claim(Threaded("raises"), Act("done"))
            dispatch.admit(leases)
            entries = {entry.id: entry for entry in await dispatch.all_outcomes(leases)}
            assert (entries[leases[0].id].error or "").startswith(text)
            assert entries[leases[1].id].kind == "done"

    play(clock, main())


def test_a_step_in_a_thread_goes_on_and_may_return_anything(clock: Clock) -> None:
    idents = []

    def goes_on(ctx: Context) -> Next[Act]:
        idents.append(threading.get_ident())
        with pytest.raises(RuntimeError, match="no running event loop"):
            asyncio.get_running_loop()
        return Next(Act("done"))

    def nothing(ctx: Context) -> Any:
        return None

    async def main() -> None:
        with scripted(goes_on=goes_on, nothing=nothing) as (dispatch, _):
            leases = dispatch.claim(Threaded("goes_on"), Threaded("nothing"))
            dispatch.admit(leases)
            entries = await dispatch.all_outcomes(leases)
            assert [entry.kind for entry in entries if entry.id == leases[0].id] == ["kept", "done"]
            (wrong,) = [entry for entry in entries if entry.id == leases[1].id]
            assert "Script.Threaded returned None: a return is missing" in (wrong.error or "")
            assert threading.get_ident() not in idents

    play(clock, main())


def test_a_thread_that_times_out_is_abandoned_and_keeps_its_slot(clock: Clock) -> None:
    gate = threading.Event()

    def blocks(ctx: Context) -> Done:
        gate.wait(20)
        return Done()

    async def main() -> None:
        with scripted(concurrency=1, blocks=blocks) as (dispatch, _):
            slow, other = dispatch.claim(ThreadedTimed("blocks"), Act("done"))
            dispatch.admit([slow, other])
            try:
                (entry,) = await dispatch.all_outcomes([slow])
                text = "Script.ThreadedTimed ran longer than its timeout of 0.005 s"
                assert (entry.id, entry.error, entry.tried) == (slow.id, text, 1)
                await turns(10)
                assert (dispatch.suspended, len(dispatch.ready)) == (1, 1)
            finally:
                gate.set()
            (entry,) = await dispatch.all_outcomes([slow, other])  # the thread's own outcome is not among them
            assert (entry.id, entry.kind) == (other.id, "done")
            assert dispatch.suspended == 0

    play(clock, main())


@pytest.mark.parametrize("end", ["lose", "stop"])
def test_a_thread_cannot_be_cancelled(clock: Clock, end: str) -> None:
    gate = threading.Event()

    def blocks(ctx: Context) -> Done:
        gate.wait(20)
        raise ValueError

    async def main() -> None:
        with scripted(concurrency=1, blocks=blocks) as (dispatch, _):
            lease, other = dispatch.claim(Threaded("blocks"), Act("done"))
            dispatch.admit([lease, other])
            await turns(3)
            getattr(dispatch, end)(lease)
            assert dispatch.suspended == 1
            gate.set()
            (entry,) = await dispatch.all_outcomes([other])
            assert entry.id == other.id
            assert lease.is_open == (end == "stop")
            assert (dispatch.suspended, dispatch.errors) == (0, 0)

    play(clock, main())


# --- all together -------------------------------------------------------------------------------------------------

DISTURBANCES = st.lists(
    st.tuples(st.integers(0, 12), st.sampled_from(["lose", "stop", "drain", "take back", "open"]), st.integers(0, 9)),
    max_size=8,
)


@settings(deadline=None, max_examples=150, phases=PHASES)
@given(
    st.lists(st.sampled_from(["done", "waits", "goes_on", "fails", "swallows", "suspended"]), min_size=1, max_size=10),
    DISTURBANCES,
    st.integers(1, 4),
)
def test_every_lease_ends_once_or_is_lost_or_given_back(
    names: list[str], disturbances: list[tuple[int, str, int]], concurrency: int
) -> None:
    async def goes_on(ctx: Context) -> Next[Act]:
        await turns(ctx.task_id.int % 3)
        return Next(Act("waits"))

    async def fails(ctx: Context) -> Done:
        raise ValueError

    async def main() -> None:
        async def swallows(ctx: Context) -> Done:
            while not scripts.gate.is_set():
                try:
                    await scripts.gate.wait()
                except asyncio.CancelledError:
                    await turns(2)
            return Done()

        runs = {"goes_on": goes_on, "fails": fails, "swallows": swallows, "suspended": suspended}
        with scripted(concurrency=concurrency, **runs) as (dispatch, scripts):
            leases = dispatch.claim(*map(Act, names))
            dispatch.admit(leases)
            ends: collections.Counter[UUID] = collections.Counter()
            lost: set[UUID] = set()
            given_back: set[UUID] = set()
            for turn in range(100):
                for when, what, number in disturbances:
                    lease = leases[number % len(leases)]
                    if when != turn:
                        continue
                    match what:
                        case "lose" if lease.is_open and lease.id not in given_back:
                            dispatch.lose(lease)
                            lost.add(lease.id)
                        case "stop":
                            dispatch.stop(lease)
                        case "drain":
                            dispatch.draining = True
                        case "take back":
                            given_back |= {lease.id for lease in dispatch.take_ready()}
                        case "open":
                            scripts.gate.set()
                if turn == 20:
                    scripts.gate.set()
                outcomes = dispatch.take()
                dispatch.go_on(outcomes.kept)
                ends.update(lease.id for lease in outcomes.done + outcomes.moved)
                assert dispatch.suspended <= concurrency
                assert not dispatch.broken
                await asyncio.sleep(0)
            assert dispatch.suspended == len(dispatch.ready) == len(dispatch.outcomes) == 0
            for lease in leases:
                if lease.is_open or lease.id in given_back:  # stopped, or never started: to be released
                    assert ends[lease.id] == 0
                elif lease.id in lost:
                    assert ends[lease.id] <= 1  # it may have ended just before it was lost
                else:
                    assert ends[lease.id] == 1

    play("asyncio", main())


@pytest.mark.parametrize(("name", "rounds"), [("done", 400), ("suspended", 60)])
def test_the_dispatcher_leaves_nothing_behind(clock: Clock, name: str, rounds: int) -> None:
    """Neither memory nor garbage: reference counts free what a step has used, and the collector finds nothing."""

    async def main() -> None:
        with scripted(concurrency=100, suspended=suspended) as (dispatch, _):

            async def batch() -> None:
                leases = dispatch.claim(*[Act(name)] * 500)
                dispatch.admit(leases)
                await dispatch.all_outcomes(leases)
                for lease in leases:
                    dispatch.held.remove(lease)
                leases.clear()
                await turns(3)

            for _ in range(4):
                await batch()
            gc.collect()
            gc.disable()
            try:
                before = sys.getallocatedblocks()
                for _ in range(rounds):
                    await batch()
                after = sys.getallocatedblocks()
                garbage = gc.collect()
            finally:
                gc.enable()
            assert len(dispatch.held) == dispatch.suspended == 0
            assert garbage < 50
            assert after - before < rounds * 50, "blocks are left for each step"

    play(clock, main())
