"""When a suspect has its process to itself, and what the others have of that; by a clock of the test."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any
from uuid import UUID, uuid4

import pytest

from pgtask import App, Context, Done, Task
from pgtask._fastpath import Leases
from pgtask._worker.decode import table_of
from pgtask._worker.dispatch import Dispatch
from pgtask._worker.suspects import MOST_CLAIMS, PATIENCE, SESSION, SOLITUDE, Suspects


class Family(Task): ...


class Waits(Family):
    async def run(self, ctx: Context) -> Done:
        await gates[ctx.task_id.int].wait()
        return Done()


gates: dict[int, asyncio.Event] = {}


class Stand:
    """A dispatcher without a database, the suspects, and a clock that stands still."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, concurrency: int = 10) -> None:
        self.now = 1000.0
        monkeypatch.setattr("pgtask._worker.suspects.time", SimpleNamespace(monotonic=lambda: self.now))
        self.leases = Leases()
        self.dispatch = Dispatch(
            table_of(App(Family)),
            self.leases,
            concurrency=concurrency,
            max_step_bytes=1000,
            wake=lambda: None,
            unknown=lambda _: None,
            broke=lambda error: pytest.fail(str(error)),
        )
        self.suspects = Suspects(self.dispatch)

    def claim(self, *numbers: int, claims: int = 1) -> None:
        for number in numbers:
            gates[number] = asyncio.Event()
        rows = [(UUID(int=number), '{"Family":{"Waits":null}}', 0, claims, None) for number in numbers]
        leases, _ = self.leases.claimed(rows, uuid4(), 0.0)
        if claims > 1:
            self.suspects.receive(self.leases.take_suspects())
        else:
            self.dispatch.admit(leases)

    async def turn(self, seconds: float = 0.0, *, is_idle: bool = False) -> list[int]:
        """A turn after so many seconds; who executes afterwards. What has ended is as good as flushed."""
        self.now += seconds
        await self.settle()
        outcomes = self.dispatch.take()
        self.leases.remove_all(outcomes.done + outcomes.moved)
        self.suspects.turn(is_quiet=not self.dispatch.suspended, is_idle=is_idle)
        return await self.settle()

    async def settle(self) -> list[int]:
        for _ in range(20):
            await asyncio.sleep(0)
        return sorted(lease.id.int for lease in self.leases.open() if lease.is_running)

    def charged(self) -> list[int]:
        """Whom the death of the process would be laid to, if it came now."""
        return sorted(int.from_bytes(task, "big") for task in self.dispatch.marks.charged())


def play(scenario: Any) -> None:
    asyncio.run(scenario())


def test_suspects_are_alone_one_after_the_other_without_a_write_in_between(monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario() -> None:
        stand = Stand(monkeypatch)
        stand.claim(1, 2)
        assert await stand.turn() == [1, 2]
        stand.claim(11, 12, 13, claims=2)
        assert await stand.turn() == [1, 2]
        assert stand.suspects.is_hushed
        stand.claim(3)
        gates[1].set()
        gates[2].set()
        assert await stand.turn() == [11]
        for ends, follows in (11, [12]), (12, [13]):
            gates[ends].set()
            assert await stand.settle() == follows, "no turn, and no flush"
        gates[13].set()
        assert await stand.turn() == [3]
        assert not stand.suspects.is_hushed

    play(scenario)


def test_who_waits_in_vain_for_quiet_waits_longer_the_next_time(monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario() -> None:
        stand = Stand(monkeypatch)
        stand.claim(1)
        await stand.turn()
        for patience in PATIENCE, 2 * PATIENCE, 4 * PATIENCE:
            stand.claim(11, claims=2)
            await stand.turn(100)
            assert stand.suspects.is_hushed
            assert await stand.turn(patience - 0.1) == [1]
            assert (stand.suspects.is_hushed, len(stand.suspects)) == (True, 1)
            assert await stand.turn(0.2) == [1]
            assert (stand.suspects.is_hushed, len(stand.suspects)) == (False, 0)
            assert stand.dispatch.outcomes.moved_claims == [1], "put back uncharged"
            stand.leases.remove_all(stand.leases.due(float("inf"))[1:])

    play(scenario)


def test_behind_a_long_one_the_others_are_put_back_and_it_has_company_again(monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario() -> None:
        stand = Stand(monkeypatch)
        stand.claim(11, 12, 13, claims=2)
        assert await stand.turn() == [11]
        stand.claim(1)
        assert await stand.turn(SESSION - 0.1) == [11]
        assert not stand.dispatch.outcomes.moved
        assert await stand.turn(0.2) == [11]
        assert sorted(lease.id.int for lease in stand.dispatch.outcomes.moved) == [12, 13]
        assert await stand.turn(SOLITUDE) == [1, 11]

    play(scenario)


def test_who_has_its_last_chance_is_alone_to_its_end(monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario() -> None:
        stand = Stand(monkeypatch)
        stand.claim(11, 12, claims=MOST_CLAIMS)
        assert [lease.id.int for lease in stand.dispatch.outcomes.moved] == [12], "one of them at a time"
        assert await stand.turn() == [11]
        stand.claim(1)
        assert await stand.turn(1000) == [11]
        gates[11].set()
        assert await stand.turn() == [1]

    play(scenario)


def test_who_has_its_last_chance_does_not_begin_before_the_outcome_of_another_suspect_is_written(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A callback that the other one has left may be what kills the process; nor does anybody begin behind it."""

    async def scenario() -> None:
        stand = Stand(monkeypatch)
        stand.claim(11, claims=2)
        stand.claim(12, claims=MOST_CLAIMS)
        stand.claim(13, claims=2)
        assert await stand.turn() == [11]
        gates[11].set()
        assert await stand.settle() == []
        assert stand.charged() == [11]
        assert await stand.turn() == [12]
        assert stand.charged() == [12]
        stand.claim(1)
        gates[12].set()
        assert await stand.settle() == []
        assert stand.charged() == [12]
        assert await stand.turn() == [13]
        gates[13].set()
        assert await stand.settle() == []
        assert await stand.turn() == [1]
        assert stand.charged() == [1]

    play(scenario)


def test_suspects_that_have_ended_are_charged_until_they_are_written(monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario() -> None:
        stand = Stand(monkeypatch)
        stand.claim(11, 12, 13, claims=2)
        assert await stand.turn() == [11]
        for number in 11, 12:
            gates[number].set()
            await stand.settle()
        assert stand.charged() == [11, 12, 13]
        await stand.turn()
        assert stand.charged() == [13]

    play(scenario)


def test_behind_one_with_its_last_chance_that_is_long_the_others_are_put_back(monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario() -> None:
        stand = Stand(monkeypatch)
        stand.claim(11, claims=MOST_CLAIMS)
        stand.claim(12, 13, claims=2)
        assert await stand.turn() == [11]
        assert await stand.turn(SESSION + 0.1) == [11]
        assert sorted(lease.id.int for lease in stand.dispatch.outcomes.moved) == [12, 13]

    play(scenario)


def test_a_hush_is_followed_by_as_much_normal_work_unless_there_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario() -> None:
        stand = Stand(monkeypatch)
        for is_idle in False, True:
            stand.claim(11, claims=2)
            assert await stand.turn(100) == [11]
            gates[11].set()
            assert await stand.turn(0.8) == []
            stand.claim(12, claims=2)
            assert await stand.turn(0.7, is_idle=is_idle) == ([12] if is_idle else [])
            assert await stand.turn(0.2) == [12]
            gates[12].set()
            await stand.turn()

    play(scenario)
