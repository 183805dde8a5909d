"""The order of replacements in a rolling restart, without a fork."""

from __future__ import annotations

import msgspec
import pytest

from pgtask._supervisor import rolling_restart as replace
from pgtask._supervisor.rolling_restart import RollingRestart
from pgtask._supervisor.slot import SupervisedWorker
from pgtask._supervisor.states import State


class Workers:
    """Workers in states that the test sets."""

    def __init__(self, size: int) -> None:
        self.workers = [SupervisedWorker(number) for number in range(1, size + 1)]
        self.started: list[SupervisedWorker] = []
        self.stopped: list[SupervisedWorker] = []
        self.replacements = RollingRestart(self.start, self.stop)
        for worker in self.workers:
            become(worker, State.READY)

    def start(self, number: int) -> SupervisedWorker:
        worker = SupervisedWorker(number, trial=True)
        become(worker, State.STARTING)
        self.started.append(worker)
        return worker

    def stop(self, worker: SupervisedWorker) -> None:
        if worker.slot.state is not State.GONE:
            become(worker, State.STOPPING)
            self.stopped.append(worker)

    def advance(self) -> None:
        self.replacements.advance()


def become(worker: SupervisedWorker, state: State) -> None:
    trial = worker.slot.trial and state is not State.READY
    worker.slot = msgspec.structs.replace(worker.slot, state=state, trial=trial)


def test_reload_replaces_one_at_a_time() -> None:
    fleet = Workers(2)
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


def test_reload_skips_worker_between_two_processes() -> None:
    fleet = Workers(3)
    become(fleet.workers[0], State.BACKOFF)
    become(fleet.workers[1], State.STOPPING)
    fleet.replacements.reload(fleet.workers, "SIGHUP")
    fleet.advance()
    assert [worker.number for worker in fleet.started] == [3]


@pytest.mark.parametrize("end", [State.GONE, State.BACKOFF])
def test_old_worker_may_die_before_its_replacement_is_ready(end: State) -> None:
    fleet = Workers(1)
    fleet.replacements.reload(fleet.workers, "SIGHUP")
    fleet.advance()
    become(fleet.workers[0], end)
    become(fleet.started[0], State.READY)
    fleet.advance()
    become(fleet.workers[0], State.GONE)
    fleet.advance()
    assert len(fleet.started) == 1


def test_failed_replacement_ends_reload() -> None:
    fleet = Workers(3)
    fleet.replacements.reload(fleet.workers, "SIGHUP")
    fleet.advance()
    become(fleet.started[0], State.GONE)
    fleet.replacements.abort_replacement(fleet.started[0], "broken")
    fleet.advance()
    assert len(fleet.started) == 1
    assert not fleet.stopped


def test_second_reload_waits_for_unready_replacement_to_end() -> None:
    fleet = Workers(2)
    fleet.replacements.reload(fleet.workers, "SIGHUP")
    fleet.advance()
    fleet.replacements.reload([*fleet.workers, *fleet.started], "SIGHUP")
    assert fleet.stopped == fleet.started
    fleet.advance()
    assert len(fleet.started) == 1, "not one process more than one above their number"
    become(fleet.started[0], State.GONE)
    fleet.advance()
    assert [worker.number for worker in fleet.started] == [1, 1]


def test_second_reload_replaces_fresh_workers_again() -> None:
    fleet = Workers(1)
    fleet.replacements.reload(fleet.workers, "SIGHUP")
    fleet.advance()
    become(fleet.started[0], State.READY)
    fleet.advance()
    fleet.replacements.reload([*fleet.workers, *fleet.started], "SIGHUP")
    become(fleet.workers[0], State.GONE)
    fleet.advance()
    assert len(fleet.started) == 2


def test_worker_over_limit_is_replaced_once_until_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 1000.0
    monkeypatch.setattr("time.monotonic", lambda: now)
    fleet = Workers(2)
    for _ in range(3):
        fleet.replacements.recycle(fleet.workers[0], "max-rss")
        fleet.advance()
    become(fleet.started[0], State.GONE)
    fleet.replacements.abort_replacement(fleet.started[0], "broken")
    fleet.advance()
    now += replace.RETRY_PAUSE - 1
    fleet.replacements.recycle(fleet.workers[0], "max-rss")
    fleet.advance()
    assert len(fleet.started) == 1
    now += 1
    fleet.replacements.recycle(fleet.workers[0], "max-rss")
    fleet.advance()
    assert len(fleet.started) == 2


def test_failed_recycle_does_not_end_reload() -> None:
    fleet = Workers(2)
    fleet.replacements.recycle(fleet.workers[0], "max-tasks")
    fleet.advance()
    fleet.replacements.abort_replacement(fleet.started[0], "out of memory")
    become(fleet.started[0], State.GONE)
    fleet.replacements.reload(fleet.workers, "SIGHUP")
    fleet.advance()
    assert len(fleet.started) == 2


def test_cancel_starts_no_replacement() -> None:
    fleet = Workers(2)
    fleet.replacements.reload(fleet.workers, "SIGHUP")
    fleet.replacements.recycle(fleet.workers[0], "max-rss")
    fleet.replacements.cancel()
    fleet.advance()
    assert not fleet.started
