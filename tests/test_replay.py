"""A replay against its journal, and the waits of its branches: without a database."""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime, timedelta
from uuid import UUID

import pytest
from conftest import run
from hypothesis import given
from hypothesis import strategies as st

from pgtask._worker.entries import Checkpoint
from pgtask._worker.replay import Branch, Replay
from pgtask._worker.waits import Wait, Waits
from pgtask.errors import ReplayError


def journal(*names: str) -> list[Checkpoint]:
    return [Checkpoint(at, str(at), "step", name, "1") for at, name in enumerate(names, 1)]


def replay(recorded: list[str], asked: list[str]) -> None:
    found, branch = Replay(journal(*recorded)), Branch()
    for name in asked:
        found.find(branch.next_place(), "step", name)
    found.check_end()


NAMES = st.lists(st.sampled_from("abcd"), unique=True, max_size=4)


@given(NAMES, NAMES)
def test_a_replay_is_right_exactly_if_it_begins_with_what_is_recorded(recorded: list[str], asked: list[str]) -> None:
    if asked[: len(recorded)] == recorded:
        replay(recorded, asked)
    else:
        with pytest.raises(ReplayError):
            replay(recorded, asked)


@pytest.mark.parametrize(
    ("recorded", "asked", "text"),
    [
        ("ab", "ba", "asks for step 'b' at place 1, where the journal has step 'a'"),
        ("abc", "ac", "asks for step 'c' at place 2, where the journal has step 'b'"),
        ("ab", "a", "ends without step 'b', which the journal has at place 2"),
        ("", "aa", "step 'a' is asked for twice"),
    ],
)
def test_both_sides_are_named(recorded: str, asked: str, text: str) -> None:
    with pytest.raises(ReplayError, match=text):
        replay(list(recorded), list(asked))


def test_a_name_that_has_moved_behind_the_journal_is_found() -> None:
    found = Replay([Checkpoint(1, "2", "step", "a", "1")])
    with pytest.raises(ReplayError, match="asks for step 'a' at place 3, and the journal has it at 2"):
        found.find("3", "step", "a")


def test_another_kind_under_the_same_name_is_another_thing() -> None:
    with pytest.raises(ReplayError, match="asks for sleep 'a' at place 1, where the journal has step 'a'"):
        Replay(journal("a")).find("1", "sleep", "a")


def test_places_of_branches_do_not_depend_on_who_is_faster() -> None:
    left, right = Branch("2.0."), Branch("2.1.")
    assert [left.next_place(), right.next_place(), left.next_place()] == ["2.0.1", "2.1.1", "2.0.2"]


NOW = datetime(2026, 1, 1, tzinfo=UTC)


class Decider:
    """Lets the run go after so many looks."""

    def __init__(self, looks: int) -> None:
        self.seen: list[list[str]] = []
        self.looks = looks

    async def __call__(self, waits: list[Wait]) -> None:
        await asyncio.sleep(0)
        self.seen.append([wait.what for wait in waits])
        if len(self.seen) > self.looks:
            raise KeyboardInterrupt  # any BaseException


def test_nothing_is_decided_while_a_branch_is_at_work() -> None:
    async def main() -> None:
        decider = Decider(looks=1)
        waits = Waits(decider, lambda: NOW)
        waits.begin(1)
        first = asyncio.create_task(waits.wait(Wait("first")))
        await asyncio.sleep(0)
        assert decider.seen == []
        await waits.wait(Wait("second"))  # now all wait, and look again
        await first
        assert decider.seen == [["first", "second"]]

    run(main())


def test_the_end_of_the_last_branch_at_work_decides() -> None:
    async def main() -> None:
        decider = Decider(looks=1)
        waits = Waits(decider, lambda: NOW)
        waits.begin(1)
        first = asyncio.create_task(waits.wait(Wait("first")))
        await asyncio.sleep(0)
        await waits.end()
        await first
        assert decider.seen == [["first"]]

    run(main())


def test_a_wait_whose_time_has_come_goes_on_beside_a_branch_at_work() -> None:
    async def main() -> None:
        decider = Decider(looks=0)
        waits = Waits(decider, lambda: NOW)
        waits.begin(1)
        await waits.wait(Wait("nap", NOW + timedelta(milliseconds=10)))
        assert decider.seen == []

    run(main())


def test_what_comes_from_outside_is_looked_for_beside_a_branch_at_work(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pgtask._worker.waits.LOOK", 0.01)
    monkeypatch.setattr("pgtask._worker.waits.LOOK_AT_CHILD", 0.1)

    async def main() -> None:
        decider = Decider(looks=0)
        waits = Waits(decider, lambda: NOW)
        waits.begin(3)
        nap = asyncio.create_task(waits.wait(Wait("nap", NOW + timedelta(hours=1))))
        children = asyncio.create_task(waits.wait(Wait("children", children=(UUID(int=1),) * 1000)))
        await waits.wait(Wait("signal", seen_at=NOW))
        await waits.wait(Wait("one child", children=(UUID(int=1),)))
        assert (nap.done(), children.done(), decider.seen) == (False, False, [])
        nap.cancel()
        children.cancel()
        await asyncio.gather(nap, children, return_exceptions=True)

    run(main())


def test_a_stop_reaches_all_who_wait() -> None:
    async def main() -> None:
        waits = Waits(Decider(looks=0), lambda: NOW)
        waits.begin(2)
        tasks = [asyncio.create_task(waits.wait(Wait(name))) for name in "ab"]
        await asyncio.sleep(0)
        waits.stop(ValueError("stopped"))
        for task in tasks:
            with pytest.raises(ValueError, match="stopped"):
                await task

    run(main())
