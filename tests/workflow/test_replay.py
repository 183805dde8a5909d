"""A replay matched against its history, and the waits of its branches: without a database."""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime, timedelta
from uuid import UUID

import pytest
from fix_database import run
from hypothesis import given
from hypothesis import strategies as st

from pgtask._workflow.branches import Branch, Branches, Wait
from pgtask._workflow.history import RunHistory
from pgtask._workflow.values import Checkpoint, History
from pgtask.errors import ReplayError

NOW = datetime(2026, 1, 1, tzinfo=UTC)


def journal(*names: str) -> list[Checkpoint]:
    return [Checkpoint(at, str(at), "step", name, "1") for at, name in enumerate(names, 1)]


def history(checkpoints: list[Checkpoint]) -> RunHistory:
    return RunHistory(History(NOW, True, 1, None, checkpoints, NOW), newest=1, failed_before=0)


def replay(recorded: list[str], asked: list[str]) -> None:
    found, branch = history(journal(*recorded)), Branch()
    for name in asked:
        found.look_up(branch.next_place(), "step", name)
    found.check_end()


NAMES = st.lists(st.sampled_from("abcd"), unique=True, max_size=4)


@given(NAMES, NAMES)
def test_replay_is_right_exactly_if_it_begins_with_its_history(recorded: list[str], asked: list[str]) -> None:
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
def test_replay_error_names_both_sides(recorded: str, asked: str, text: str) -> None:
    with pytest.raises(ReplayError, match=text):
        replay(list(recorded), list(asked))


def test_a_name_that_has_moved_behind_the_journal_is_found() -> None:
    found = history([Checkpoint(1, "2", "step", "a", "1")])
    with pytest.raises(ReplayError, match="asks for step 'a' at place 3, and the journal has it at 2"):
        found.look_up("3", "step", "a")


def test_another_kind_under_the_same_name_is_another_thing() -> None:
    with pytest.raises(ReplayError, match="asks for sleep 'a' at place 1, where the journal has step 'a'"):
        history(journal("a")).look_up("1", "sleep", "a")


def test_places_of_branches_do_not_depend_on_who_is_faster() -> None:
    left, right = Branch("2.0."), Branch("2.1.")
    assert [left.next_place(), right.next_place(), left.next_place()] == ["2.0.1", "2.1.1", "2.0.2"]


class Decider:
    """Suspends the run after this many looks."""

    def __init__(self, looks: int) -> None:
        self.seen: list[list[str]] = []
        self.looks = looks

    async def __call__(self, waits: list[Wait]) -> None:
        await asyncio.sleep(0)
        self.seen.append([wait.what for wait in waits])
        if len(self.seen) > self.looks:
            raise KeyboardInterrupt  # any BaseException


def test_run_is_not_suspended_while_a_branch_works() -> None:
    async def main() -> None:
        decider = Decider(looks=1)
        branches = Branches(decider, lambda: NOW)
        branches.begin(1)
        first = asyncio.create_task(branches.wait(Wait("first")))
        await asyncio.sleep(0)
        assert decider.seen == []
        await branches.wait(Wait("second"))  # now all wait, and look again
        await first
        assert decider.seen == [["first", "second"]]

    run(main())


def test_end_of_the_last_working_branch_suspends_the_run() -> None:
    async def main() -> None:
        decider = Decider(looks=1)
        branches = Branches(decider, lambda: NOW)
        branches.begin(1)
        first = asyncio.create_task(branches.wait(Wait("first")))
        await asyncio.sleep(0)
        await branches.end()
        await first
        assert decider.seen == [["first"]]

    run(main())


def test_due_wait_goes_on_beside_a_working_branch() -> None:
    async def main() -> None:
        decider = Decider(looks=0)
        branches = Branches(decider, lambda: NOW)
        branches.begin(1)
        await branches.wait(Wait("nap", NOW + timedelta(milliseconds=10)))
        assert decider.seen == []

    run(main())


def test_branch_polls_for_signals_beside_a_working_branch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pgtask._workflow.branches.POLL_INTERVAL", 0.01)
    monkeypatch.setattr("pgtask._workflow.branches.POLL_PER_CHILD", 0.1)

    async def main() -> None:
        decider = Decider(looks=0)
        branches = Branches(decider, lambda: NOW)
        branches.begin(3)
        nap = asyncio.create_task(branches.wait(Wait("nap", NOW + timedelta(hours=1))))
        children = asyncio.create_task(branches.wait(Wait("children", children=(UUID(int=1),) * 1000)))
        await branches.wait(Wait("signal", seen_at=NOW))
        await branches.wait(Wait("one child", children=(UUID(int=1),)))
        assert (nap.done(), children.done(), decider.seen) == (False, False, [])
        nap.cancel()
        children.cancel()
        await asyncio.gather(nap, children, return_exceptions=True)

    run(main())


def test_stop_reaches_all_waiting_branches() -> None:
    async def main() -> None:
        branches = Branches(Decider(looks=0), lambda: NOW)
        branches.begin(2)
        tasks = [asyncio.create_task(branches.wait(Wait(name))) for name in "ab"]
        await asyncio.sleep(0)
        branches.stop(ValueError("stopped"))
        for task in tasks:
            with pytest.raises(ValueError, match="stopped"):
                await task

    run(main())
