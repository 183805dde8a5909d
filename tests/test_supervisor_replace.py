"""Who makes way for whom and when, without a fork."""

from __future__ import annotations

import msgspec
import pytest

from pgtask._supervisor import replace
from pgtask._supervisor.replace import Replacements
from pgtask._supervisor.states import State
from pgtask._supervisor.worker import Worker


class Fleet:
    """Workers in states that the test sets."""

    def __init__(self, size: int) -> None:
        self.workers = [Worker(number) for number in range(1, size + 1)]
        self.started: list[Worker] = []
        self.stopped: list[Worker] = []
        self.replacements = Replacements(self.start, self.stop)
        for worker in self.workers:
            become(worker, State.READY)

    def start(self, number: int) -> Worker:
        worker = Worker(number, trial=True)
        become(worker, State.STARTING)
        self.started.append(worker)
        return worker

    def stop(self, worker: Worker) -> None:
        if worker.slot.state is not State.GONE:
            become(worker, State.STOPPING)
            self.stopped.append(worker)

    def advance(self) -> None:
        self.replacements.advance()


def become(worker: Worker, state: State) -> None:
    trial = worker.slot.trial and state is not State.READY
    worker.slot = msgspec.structs.replace(worker.slot, state=state, trial=trial)


def test_one_at_a_time_and_the_old_one_last() -> None:
    fleet = Fleet(2)
    fleet.replacements.reload(fleet.workers, "SIGHUP")
    for turn, old in enumerate(fleet.workers):
        fleet.advance()
        fleet.advance()
        assert len(fleet.started) == turn + 1
        assert fleet.started[turn].number == old.number
        assert fleet.stopped == fleet.workers[:turn], "the new one is not ready"
        become(fleet.started[turn], State.READY)
        fleet.advance()
        assert fleet.stopped == fleet.workers[: turn + 1]
        fleet.advance()
        assert len(fleet.started) == turn + 1, "the old one is not gone"
        become(old, State.GONE)
    fleet.advance()
    assert len(fleet.started) == 2


def test_who_is_between_two_processes_gets_fresh_code_anyway() -> None:
    fleet = Fleet(3)
    become(fleet.workers[0], State.BACKOFF)
    become(fleet.workers[1], State.STOPPING)
    fleet.replacements.reload(fleet.workers, "SIGHUP")
    fleet.advance()
    assert [worker.number for worker in fleet.started] == [3]


@pytest.mark.parametrize("end", [State.GONE, State.BACKOFF])
def test_the_old_one_may_die_first(end: State) -> None:
    fleet = Fleet(1)
    fleet.replacements.reload(fleet.workers, "SIGHUP")
    fleet.advance()
    become(fleet.workers[0], end)
    become(fleet.started[0], State.READY)
    fleet.advance()
    become(fleet.workers[0], State.GONE)
    fleet.advance()
    assert len(fleet.started) == 1


def test_a_failure_ends_a_reload() -> None:
    fleet = Fleet(3)
    fleet.replacements.reload(fleet.workers, "SIGHUP")
    fleet.advance()
    become(fleet.started[0], State.GONE)
    fleet.replacements.failed(fleet.started[0], "broken")
    fleet.advance()
    assert len(fleet.started) == 1
    assert not fleet.stopped


def test_a_second_reload_stops_what_has_not_started_and_waits_for_its_end() -> None:
    fleet = Fleet(2)
    fleet.replacements.reload(fleet.workers, "SIGHUP")
    fleet.advance()
    fleet.replacements.reload([*fleet.workers, *fleet.started], "SIGHUP")
    assert fleet.stopped == fleet.started
    fleet.advance()
    assert len(fleet.started) == 1, "not one process more than one above their number"
    become(fleet.started[0], State.GONE)
    fleet.advance()
    assert [worker.number for worker in fleet.started] == [1, 1]


def test_a_second_reload_replaces_those_replaced_before_as_well() -> None:
    fleet = Fleet(1)
    fleet.replacements.reload(fleet.workers, "SIGHUP")
    fleet.advance()
    become(fleet.started[0], State.READY)
    fleet.advance()
    fleet.replacements.reload([*fleet.workers, *fleet.started], "SIGHUP")
    become(fleet.workers[0], State.GONE)
    fleet.advance()
    assert len(fleet.started) == 2


def test_who_is_over_a_limit_is_replaced_once_and_a_failure_gives_it_a_rest(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 1000.0
    monkeypatch.setattr("time.monotonic", lambda: now)
    fleet = Fleet(2)
    for _ in range(3):
        fleet.replacements.recycle(fleet.workers[0], "max-rss")
        fleet.advance()
    become(fleet.started[0], State.GONE)
    fleet.replacements.failed(fleet.started[0], "broken")
    fleet.advance()
    now += replace.REST - 1
    fleet.replacements.recycle(fleet.workers[0], "max-rss")
    fleet.advance()
    assert len(fleet.started) == 1
    now += 1
    fleet.replacements.recycle(fleet.workers[0], "max-rss")
    fleet.advance()
    assert len(fleet.started) == 2


def test_a_failure_of_one_over_a_limit_ends_no_reload() -> None:
    fleet = Fleet(2)
    fleet.replacements.recycle(fleet.workers[0], "max-tasks")
    fleet.advance()
    fleet.replacements.failed(fleet.started[0], "out of memory")
    become(fleet.started[0], State.GONE)
    fleet.replacements.reload(fleet.workers, "SIGHUP")
    fleet.advance()
    assert len(fleet.started) == 2


def test_nothing_is_started_when_all_stop() -> None:
    fleet = Fleet(2)
    fleet.replacements.reload(fleet.workers, "SIGHUP")
    fleet.replacements.recycle(fleet.workers[0], "max-rss")
    fleet.replacements.cancel()
    fleet.advance()
    assert not fleet.started
