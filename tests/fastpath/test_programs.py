"""The dispatcher drives steps as `asyncio.create_task` would: the same little programs on both."""

from __future__ import annotations

import asyncio
import collections
import re
from collections.abc import Callable
from typing import Any, NamedTuple
from uuid import UUID, uuid4

import msgspec
import reference
from dispatch_stage import rows_of
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from jumping_loop import run_on
from step_programs import ERRORS, MAX_STEP_BYTES, NEW, PLAY, WRONG_ENDS, World, turns

from pgtask import PgtaskError
from pgtask._error_text import describe
from pgtask._fastpath import Leases, Table
from pgtask._postgres.connection import is_connection_loss
from pgtask._worker.dispatch import Dispatch


class Record(NamedTuple):
    """The traces of a run: the outcomes, the notes and the callbacks of each task, by its number."""

    outcomes: list[list[tuple[Any, ...]]]
    notes: list[list[str]]
    callbacks: list[int]


def described(error: BaseException | str) -> str:
    """Return an error's text without places and addresses; for pgtask's own errors only the class."""
    if isinstance(error, PgtaskError):
        return type(error).__name__
    lines = [re.sub(r" \(at [^()]* in [^()]*\)$", "", line) for line in describe(error).splitlines()]
    return "\n".join(re.sub(r"<.*>", "<>", line) for line in lines)


class Described(Dispatch):
    def describe_error(self, error: BaseException | str) -> str:
        return described(error)


Row = tuple[UUID, str, int, int]  # id, step, tried, claims
CLAIMS = 6  # how often a rescheduled task is claimed again


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
        dispatch.admit(leases.add_claimed([(*row, None) for row in rows], uuid4(), 0.0)[0])

    def take() -> list[reference.BufferedOutcome]:
        outcomes = dispatch.take_outcomes()
        entries = list(rows_of(outcomes))
        for lease in [*outcomes.done, *[row.lease for row in outcomes.rescheduled]]:
            leases.remove(lease)
        dispatch.start_next_steps([lease for lease, _ in outcomes.continued])
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
    leases: dict[UUID, reference.TaskLease] = {}

    def admit(rows: list[Row]) -> None:
        made = [reference.TaskLease(*row) for row in rows]
        leases.update({lease.id: lease for lease in made})
        dispatch.admit(made)

    def take() -> list[reference.BufferedOutcome]:
        entries = dispatch.take_outcomes()
        dispatch.start_next_steps([leases[entry.id] for entry in entries if entry.kind == "continued"])
        return entries

    outcomes = await _pump(ids, texts, admit, take, woken)
    return _record(ids, outcomes, world)


async def _pump(
    ids: list[UUID],
    texts: list[str],
    admit: Callable[[list[Row]], None],
    take: Callable[[], list[reference.BufferedOutcome]],
    woken: asyncio.Event,
) -> dict[UUID, list[reference.BufferedOutcome]]:
    """Pump as the worker does: wait for a wake-up, take the outcomes, claim rescheduled tasks again."""
    rows = {id: (id, text, 0, 1) for id, text in zip(ids, texts, strict=True)}
    outcomes: dict[UUID, list[reference.BufferedOutcome]] = collections.defaultdict(list)
    claims = dict.fromkeys(ids, CLAIMS)
    open_ids = set(ids)
    admit(list(rows.values()))
    while True:
        woken.clear()
        entries = take()
        for entry in entries:
            id, text, tried, _ = rows[entry.id]
            outcomes[id].append(entry)
            again = entry.kind == "continued" or (entry.kind == "rescheduled" and entry.error is None)
            tried = entry.tried if entry.tried is not None else tried
            rows[id] = id, entry.step or text, tried, 1 + (entry.claims or 0)
            claims[id] -= entry.kind == "rescheduled"
            if not again or not claims[id]:
                open_ids.discard(id)
            elif entry.kind == "rescheduled":
                admit([rows[id]])
        if not open_ids:
            break
        if not entries:
            await woken.wait()
    await turns(3)  # for the callbacks of the last Tasks
    return outcomes


def _record(ids: list[UUID], outcomes: dict[UUID, list[reference.BufferedOutcome]], world: World) -> Record:
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
                    entry.new,
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
    st.tuples(
        st.sampled_from(["spreads", "spreads and goes on", "spreads and waits"]),
        st.lists(st.sampled_from(sorted(NEW)), max_size=3),
    ).map(lambda end: [end[0], *end[1]]),
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
def test_programs_on_asyncio_run_as_in_tasks_of_their_own(programs: list[str], concurrency: int) -> None:
    assert run_on("asyncio", on_engine(programs, concurrency)) == run_on("asyncio", on_oracle(programs, concurrency))


@settings(deadline=None, max_examples=50, phases=PHASES)
@given(_programs(_acts(UNTIMED), "Scene", "Urgent"), st.integers(1, 3))
def test_programs_on_uvloop_run_as_in_tasks_of_their_own(programs: list[str], concurrency: int) -> None:
    assert run_on("uvloop", on_engine(programs, concurrency)) == run_on("uvloop", on_oracle(programs, concurrency))
