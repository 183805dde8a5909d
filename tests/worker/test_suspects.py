"""The time at which a worker runs a group of suspects, and its effect on other tasks; by a clock of the test."""

from __future__ import annotations

import asyncio
import threading
import time
from types import SimpleNamespace
from typing import Any
from uuid import UUID, uuid4

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from pgtask import App, Context, Done, Next, Task
from pgtask._fastpath import Leases
from pgtask._worker.decode import build_table
from pgtask._worker.dispatch import Dispatch
from pgtask._worker.suspects import INITIAL_PAUSE, ISOLATION_TIME, MAX_CLAIMS, MAX_HOLD, MAX_PAUSE, Suspects


class Family(Task): ...


class Waits(Family):
    async def run(self, ctx: Context) -> Done:
        await gates[ctx.task_id.int].wait()
        return Done()


class GoesOn(Family):
    async def run(self, ctx: Context) -> Next[Waits]:
        return Next(Waits())


class Blocks(Family):
    def run(self, ctx: Context) -> Done:
        threads[ctx.task_id.int].wait(20)
        return Done()


gates: dict[int, asyncio.Event] = {}
threads: dict[int, threading.Event] = {}


class Stand:
    """A dispatcher without a database, the suspects, and a clock that stands still."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, concurrency: int = 10) -> None:
        self.now = 1000.0
        monkeypatch.setattr("pgtask._worker.suspects.time", SimpleNamespace(monotonic=lambda: self.now))
        self.leases = Leases()
        self.dispatch = Dispatch(
            build_table(App(Family)),
            self.leases,
            concurrency=concurrency,
            max_step_bytes=1000,
            wake=lambda: None,
            unknown=lambda _: None,
            broke=lambda error: pytest.fail(str(error)),
        )
        self.suspects = Suspects(self.dispatch, max_group=concurrency)

    @property
    def is_empty(self) -> bool:
        return not (self.dispatch.suspended or len(self.dispatch.outcomes) or self.dispatch.ready)

    def claim(
        self, *numbers: int, claims: int = 1, due: float = 1.0, step: str = "Waits", requested: int | None = None
    ) -> None:
        self.claim_rows([(number, claims, due) for number in numbers], step, requested)

    def claim_rows(self, rows: list[tuple[int, int, float]], step: str = "Waits", requested: int | None = None) -> None:
        """Bring all of these by one claim: number, claims, due. It requested `requested` tasks, by default one more."""
        for number, _, _ in rows:
            gates[number] = asyncio.Event()
        found = [(UUID(int=number), f'{{"Family":{{"{step}":null}}}}', 0, *rest) for number, *rest in rows]
        leases, _ = self.leases.add_claimed(
            [(id, text, tried, claims, None, due) for id, text, tried, claims, due in found], uuid4(), 0.0
        )
        suspects = self.leases.take_suspects()
        self.dispatch.admit(
            self.suspects.sort_claimed(leases, suspects, requested=requested or len(rows) + 1, is_empty=self.is_empty)
        )

    async def turn(self, seconds: float = 0.0, *, is_idle: bool = False) -> list[int]:
        """Pump after so many seconds, and write what has ended. Return the tasks that execute afterwards."""
        self.now += seconds
        for _ in range(3):
            await self.settle()
            outcomes = self.dispatch.take_outcomes()
            self.leases.remove_all([*outcomes.done, *[row.lease for row in outcomes.rescheduled]])
            self.dispatch.start_next_steps([lease for lease, _ in outcomes.continued])
            self.suspects.advance(is_empty=self.is_empty, is_idle=is_idle and self.is_empty)
        return await self.settle()

    async def settle(self) -> list[int]:
        for _ in range(20):
            await asyncio.sleep(0)
        return self.executing

    async def threads_end(self) -> None:
        deadline = time.monotonic() + 10
        while self.dispatch.suspended and time.monotonic() < deadline:
            await self.settle()

    @property
    def executing(self) -> list[int]:
        return sorted(lease.id.int for lease in self.leases.list_open() if lease.is_running)

    def take_released(self) -> list[int]:
        back = self.suspects.take_unwanted()
        self.leases.remove_all(back)
        return sorted(lease.id.int for lease in back)

    def implicated(self) -> list[int]:
        """Return the tasks that a death of the process would implicate now."""
        return sorted(int.from_bytes(task, "big") for task in self.dispatch.marks.implicated())


def play(scenario: Any) -> None:
    asyncio.run(scenario())


def test_empty_worker_runs_one_group_and_releases_the_rest(monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario() -> None:
        stand = Stand(monkeypatch)
        stand.claim_rows([(11, 2, 5.0), (12, 2, 5.0), (21, 2, 5.000001), (13, 2, 5.0)])
        assert stand.take_released() == [21]
        assert await stand.turn() == [11, 12, 13]
        assert stand.suspects.is_exclusive, "the worker claims other tasks beside the group"
        for number in 11, 12:
            gates[number].set()
        assert await stand.turn() == [13]
        assert stand.suspects.is_exclusive
        gates[13].set()
        assert await stand.turn() == []
        assert not stand.suspects.is_exclusive

    play(scenario)


def test_group_is_no_larger_than_concurrency(monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario() -> None:
        stand = Stand(monkeypatch, concurrency=3)
        stand.claim(*range(11, 16), claims=2)
        assert stand.take_released() == [14, 15]
        assert await stand.turn() == [11, 12, 13]

    play(scenario)


def test_busy_worker_first_leaves_suspects_to_others(monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario() -> None:
        stand = Stand(monkeypatch)
        stand.claim(1)
        await stand.turn()
        stand.claim_rows([(2, 1, 1.0), (11, 2, 5.0)])
        assert stand.take_released() == [11]
        assert await stand.turn() == [1, 2]
        assert not stand.suspects.is_exclusive
        assert not stand.suspects.may_claim
        stand.now += INITIAL_PAUSE
        assert stand.suspects.may_claim

    play(scenario)


def test_worker_that_becomes_idle_claims_suspects_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario() -> None:
        stand = Stand(monkeypatch)
        stand.claim(1)
        await stand.turn()
        stand.claim(11, claims=2)
        stand.take_released()
        gates[1].set()
        await stand.turn(0.1, is_idle=True)
        assert stand.suspects.may_claim

    play(scenario)


async def found_twice(stand: Stand, *numbers: int) -> None:
    stand.claim(*numbers, claims=2, due=5.0)
    assert stand.take_released() == list(numbers)
    await stand.turn(100)
    stand.claim(*numbers, claims=2, due=5.0)


def test_group_is_filled_and_starts_after_running_steps_end(monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario() -> None:
        stand = Stand(monkeypatch)
        stand.claim(1)
        await stand.turn()
        await found_twice(stand, 11)
        assert await stand.turn() == [1]
        assert stand.suspects.is_exclusive
        gates[1].set()
        await stand.settle()
        stand.leases.remove_all(stand.dispatch.take_outcomes().done)
        stand.suspects.advance(is_empty=stand.is_empty, is_idle=False)
        assert not stand.suspects.is_exclusive, "the worker does not claim the rest of the group"
        assert stand.suspects.may_claim
        stand.claim_rows([(2, 1, 1.0), (12, 2, 5.0), (21, 2, 5.5)])
        assert await stand.turn() == [11, 12]
        assert stand.take_released() == [2, 21]

    play(scenario)


def test_put_off_group_is_retried_after_growing_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario() -> None:
        stand = Stand(monkeypatch)
        stand.claim(1)
        await stand.turn()
        await found_twice(stand, 11)
        for pause in (
            INITIAL_PAUSE,
            2 * INITIAL_PAUSE,
            4 * INITIAL_PAUSE,
            8 * INITIAL_PAUSE,
            16 * INITIAL_PAUSE,
            32 * INITIAL_PAUSE,
            MAX_PAUSE,
            MAX_PAUSE,
        ):
            assert await stand.turn(MAX_HOLD - 0.1) == [1]
            assert (stand.suspects.is_exclusive, len(stand.suspects)) == (True, 1)
            assert await stand.turn(0.2) == [1]
            assert not stand.suspects.is_exclusive
            assert stand.take_released() == [11]
            await stand.turn(pause - 0.1)
            assert not stand.suspects.may_claim
            await stand.turn(0.3)
            assert stand.suspects.may_claim
            stand.claim(11, claims=2, due=5.0)
            stand.suspects.advance(is_empty=False, is_idle=False)

    play(scenario)


def test_busy_worker_leaves_each_new_group_to_others_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its record of an earlier group, which another worker has run in the end, does not matter."""

    async def scenario() -> None:
        stand = Stand(monkeypatch)
        stand.claim(1)
        await stand.turn()
        await found_twice(stand, 11)
        await stand.turn(MAX_HOLD + 0.1)
        assert stand.take_released() == [11]
        await stand.turn(1000)
        stand.claim(12, claims=2, due=6.0)
        assert not stand.suspects.is_exclusive
        assert stand.take_released() == [12]
        await stand.turn(INITIAL_PAUSE + 0.1)
        assert stand.suspects.may_claim
        stand.claim(12, claims=2, due=6.0)
        assert stand.suspects.is_exclusive
        await stand.turn(MAX_HOLD + 0.1)
        assert stand.take_released() == [12]
        await stand.turn(INITIAL_PAUSE + 0.2)
        assert stand.suspects.may_claim, "the pauses did not begin anew"

    play(scenario)


def test_group_is_filled_by_as_many_claims_as_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario() -> None:
        stand = Stand(monkeypatch, concurrency=10)

        def turn() -> float | None:
            stand.suspects.advance(is_empty=stand.is_empty, is_idle=False)
            return stand.suspects.fills_from

        stand.claim(11, 12, claims=2, due=5.0, requested=2)
        assert turn() == 5.0
        stand.claim(13, 14, claims=2, due=5.0, requested=2)
        assert turn() == 5.0
        stand.claim(15, 16, claims=2, due=5.0, requested=2)
        assert turn() == 5.0
        assert await stand.settle() == []
        stand.claim_rows([(17, 2, 5.0), (21, 2, 5.5)], requested=2)
        assert turn() is None
        assert await stand.settle() == [11, 12, 13, 14, 15, 16, 17]
        assert stand.take_released() == [21]

    play(scenario)


@pytest.mark.parametrize("brings", [True, False])
def test_group_starts_when_full_or_claim_brings_nothing(monkeypatch: pytest.MonkeyPatch, brings: bool) -> None:
    async def scenario() -> None:
        stand = Stand(monkeypatch, concurrency=4)
        stand.claim(11, 12, claims=2, due=5.0, requested=2)
        stand.suspects.advance(is_empty=True, is_idle=False)
        if brings:
            stand.claim(13, 14, claims=2, due=5.0, requested=2)
        stand.suspects.advance(is_empty=True, is_idle=False)
        assert await stand.settle() == ([11, 12, 13, 14] if brings else [11, 12])

    play(scenario)


def test_leaving_worker_stops_filling_its_group(monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario() -> None:
        stand = Stand(monkeypatch)
        stand.claim(11, claims=2)
        stand.suspects.advance(is_empty=True, is_idle=False)
        assert stand.suspects.seconds_to_wait() == 0
        assert [lease.id.int for lease in stand.suspects.take_unstarted()] == [11]
        assert stand.suspects.seconds_to_wait() == float("inf")
        assert not stand.dispatch.quarantined, "a worker that goes on, since a pause released them, starts others"

    play(scenario)


def test_group_is_not_over_while_code_of_member_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its timeout has given up the thread, and its outcome is written, but the thread may still kill the process."""

    async def scenario() -> None:
        stand = Stand(monkeypatch)
        for ends in True, False:
            go = threads[11] = threading.Event()
            stand.claim(11, claims=MAX_CLAIMS, step="Blocks")
            assert await stand.turn() == [11]
            (lease,) = stand.leases.list_open()
            stand.dispatch.drop_lost(lease)
            stand.leases.remove_all([lease])
            await stand.turn(100)
            assert (stand.suspects.is_exclusive, stand.dispatch.suspended) == (True, 1)
            assert stand.implicated() == [11]
            if not ends:
                await stand.turn(ISOLATION_TIME - 0.1)
                assert stand.suspects.is_exclusive
                await stand.turn(0.2)
                assert not stand.suspects.is_exclusive
                assert stand.implicated() == [11]
            go.set()
            await stand.threads_end()
            await stand.turn()
            assert not stand.suspects.is_exclusive

    try:
        play(scenario)
    finally:
        for go in threads.values():
            go.set()


def test_group_after_one_death_has_company_again_later(monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario() -> None:
        stand = Stand(monkeypatch)
        stand.claim(11, 12, claims=2)
        assert await stand.turn(ISOLATION_TIME - 0.1) == [11, 12]
        assert await stand.turn(ISOLATION_TIME - 0.1) == [11, 12]
        assert stand.suspects.is_exclusive
        await stand.turn(0.2)
        assert not stand.suspects.is_exclusive
        stand.claim(1)
        assert await stand.turn() == [1, 11, 12]
        assert stand.implicated() == [1, 11, 12]

    play(scenario)


def test_group_after_two_deaths_stays_alone_to_its_end(monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario() -> None:
        stand = Stand(monkeypatch)
        stand.claim_rows([(11, MAX_CLAIMS, 5.0), (12, 2, 5.0)])  # 12 joined the company of 11
        assert await stand.turn() == [11, 12]
        await stand.turn(1000)
        assert stand.suspects.is_exclusive
        gates[11].set()
        await stand.turn(1000)
        assert stand.suspects.is_exclusive
        gates[12].set()
        await stand.turn()
        assert not stand.suspects.is_exclusive

    play(scenario)


def test_ended_member_stays_implicated_until_group_is_over(monkeypatch: pytest.MonkeyPatch) -> None:
    """Even when its outcome is written: something it left behind may kill the process under the last member."""

    async def scenario() -> None:
        stand = Stand(monkeypatch)
        stand.claim(11, 12, claims=MAX_CLAIMS)
        await stand.turn()
        gates[11].set()
        assert await stand.turn() == [12]
        assert stand.implicated() == [11, 12]
        gates[12].set()
        await stand.settle()
        assert stand.implicated() == [11, 12]
        await stand.turn()
        stand.claim(1)
        await stand.turn()
        assert stand.implicated() == [1]

    play(scenario)


def test_continued_member_is_rescheduled_in_quarantine(monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario() -> None:
        stand = Stand(monkeypatch)
        stand.claim(11, claims=2, step="GoesOn")
        await stand.settle()
        stand.suspects.advance(is_empty=True, is_idle=False)
        stand.suspects.advance(is_empty=True, is_idle=False)
        await stand.settle()
        outcomes = stand.dispatch.outcomes
        assert ([row.lease.id.int for row in outcomes.rescheduled], len(outcomes.continued)) == ([11], 0)

    play(scenario)


def test_quarantine_is_followed_by_as_much_other_work(monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario() -> None:
        stand = Stand(monkeypatch)
        stand.claim(11, claims=2)
        await stand.turn()
        gates[11].set()
        await stand.turn(0.8)
        assert not stand.suspects.may_claim
        await stand.turn(0.7)
        assert not stand.suspects.may_claim
        await stand.turn(0.2)
        assert stand.suspects.may_claim
        stand.claim(12, claims=2)
        await stand.turn()
        gates[12].set()
        await stand.turn(0.8, is_idle=True)
        assert stand.suspects.may_claim

    play(scenario)


def test_leaving_worker_releases_unstarted_suspects(monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario() -> None:
        stand = Stand(monkeypatch)
        stand.claim(1)
        await stand.turn()
        await found_twice(stand, 11, 12)
        assert len(stand.suspects) == 2
        assert sorted(lease.id.int for lease in stand.suspects.take_unstarted()) == [11, 12]
        assert len(stand.suspects) == 0

    play(scenario)


def test_suspect_lost_too_often_is_parked_without_a_try(monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario() -> None:
        stand = Stand(monkeypatch)
        stand.claim_rows([(11, MAX_CLAIMS + 1, 5.0), (1, 1, 5.0)])
        assert [row.error for row in stand.dispatch.outcomes.rescheduled] == [
            "Family.Waits was running when its worker was lost 3 times"
        ]
        assert await stand.turn() == [1]

    play(scenario)


# --- the rule of halving, as release_orphaned.sql and suspects.py follow it, in a model


class ModelTask:
    """A task in the model of the rule."""

    def __init__(self, number: int, poison: bool) -> None:
        self.number, self.poison = number, poison
        self.claims = 0
        self.runs = 0
        self.state = "waits"


def deaths_of(tasks: list[ModelTask], at_once: int) -> int:
    """Run all tasks and return the number of deaths. They run in the order of their numbers, `at_once` at a time, then
    in groups. A process with a poisoned task dies when all of its tasks have begun."""
    deaths = 0
    fresh = list(tasks)
    groups: list[list[ModelTask]] = []
    while fresh or groups:
        if fresh:
            group, fresh = fresh[:at_once], fresh[at_once:]
        else:
            group = groups.pop(0)
        for task in group:
            task.claims += 1
            task.runs += 1
        if not any(task.poison for task in group):
            for task in group:
                task.state, task.claims = "done", 0
            continue
        deaths += 1
        if len(group) == 1 and group[0].claims >= MAX_CLAIMS:
            group[0].state = "parked"
            continue
        for task in group:
            task.claims = min(task.claims, MAX_CLAIMS - 1)
        middle = (len(group) + 1) // 2
        groups += [half for half in (group[:middle], group[middle:]) if half]
    return deaths


@settings(deadline=None)
@given(size=st.integers(1, 600), at_once=st.integers(1, 600), data=st.data())
@example(size=400, at_once=400, data=None)
def test_halving_parks_only_the_poisoned_tasks(size: int, at_once: int, data: st.DataObject | None) -> None:
    chosen = st.sets(st.integers(0, size - 1), max_size=5)
    poisons = {200} if data is None else data.draw(chosen)
    tasks = [ModelTask(number, number in poisons) for number in range(size)]
    deaths = deaths_of(tasks, at_once)
    assert {task.number for task in tasks if task.state == "parked"} == poisons
    assert all(task.state == "done" for task in tasks if task.number not in poisons)
    depth = (min(size, at_once) - 1).bit_length()
    assert deaths <= len(poisons) * (depth + 3)
    assert max(task.runs for task in tasks) <= depth + 3
