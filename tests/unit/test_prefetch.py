"""The number of tasks that a worker claims ahead, and those that it does not claim since it could not start them."""

from __future__ import annotations

import signal
from pathlib import Path

import poison
import pytest
from fleet import Fleet, Rows, put
from marks import MARKS

from pgtask._worker.prefetch import PREFETCH, STALE_AFTER, Prefetch


class Clock:
    """The time that `Prefetch` reads, and the totals of a worker's steps."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 1000.0
        monkeypatch.setattr("time.monotonic", lambda: self.now)
        self.busy, self.started, self.ended = 0.0, 0, 0

    def start(self, steps: int, cost: float, *, ends: bool = True) -> None:
        self.now += steps * cost
        self.busy += steps * cost
        self.started += steps
        self.ended += steps if ends else 0

    def left(
        self, prefetch: Prefetch, held: int = 0, ready: int = 0, *, late: float = 0.0, is_stuck: bool = False
    ) -> int:
        prefetch.update_window(busy=self.busy, started=self.started, ended=self.ended, late=late, is_stuck=is_stuck)
        return prefetch.free_slots(held, ready)

    def grow(self, prefetch: Prefetch, cost: float = 1e-5) -> int:
        """Claim and start until the claims stop growing; return the number of claims."""
        claims, before = 0, 0
        while (size := self.left(prefetch)) > before or prefetch.seconds_to_claim():
            if prefetch.seconds_to_claim():
                self.now += prefetch.seconds_to_claim()
                continue
            prefetch.record_claim(0.002)
            self.start(size, cost)
            claims, before = claims + 1, size
        return claims


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(monkeypatch)


def test_prefetch_follows_the_rate_and_ends_with_it(clock: Clock) -> None:
    prefetch = Prefetch(concurrency=10, batch=500)
    clock.grow(prefetch)
    assert clock.left(prefetch) == 10
    for _ in range(100):
        clock.now += 0.125
        prefetch.count_outcomes(1000)
        clock.start(500, 0.0)
        clock.left(prefetch)
    assert clock.left(prefetch) == 10 + round(8_000 * PREFETCH)
    assert clock.left(prefetch, held=400) == 10
    clock.now += STALE_AFTER
    assert clock.left(prefetch, held=10) == 0, "nothing has ended for a while: what is claimed ahead would only wait"


def test_released_prefetch_is_not_claimed_again(clock: Clock) -> None:
    prefetch = Prefetch(concurrency=10, batch=500)
    clock.grow(prefetch)
    for _ in range(10):
        clock.now += 0.125
        prefetch.count_outcomes(1000)
        clock.start(500, 0.0)
        clock.left(prefetch)
    prefetch.count_outcomes(1000)
    assert clock.left(prefetch, held=10) > 0
    prefetch.reset_rate()
    assert clock.left(prefetch, held=10) == 0


def test_window_grows_from_one_to_hundreds_in_a_few_claims(clock: Clock) -> None:
    prefetch = Prefetch(concurrency=1000, batch=500)
    assert clock.left(prefetch) == 1
    began = clock.now
    assert clock.grow(prefetch) <= 10
    assert clock.left(prefetch) == 500
    assert clock.now - began < 0.1
    clock.now += STALE_AFTER / 2
    assert clock.left(prefetch) == 500, "a short pause is no reason to begin anew"
    clock.now += STALE_AFTER
    assert clock.left(prefetch) == 1


@pytest.mark.parametrize(("cost", "most"), [(0.25, 1), (0.06, 1), (0.0249, 2), (0.00499, 10), (0.000999, 50)])
def test_waiting_tasks_are_a_prefetch_of_loop_time(clock: Clock, cost: float, most: int) -> None:
    prefetch = Prefetch(concurrency=1000, batch=500)
    for _ in range(20):
        size = clock.left(prefetch)
        assert size <= most
        prefetch.record_claim(0.002)
        clock.start(size, cost)
    assert clock.left(prefetch) == most
    assert clock.left(prefetch, held=most, ready=most) == 0, "what is in hand is enough"


def test_slow_database_enlarges_the_prefetch(clock: Clock) -> None:
    prefetch = Prefetch(concurrency=1000, batch=500)
    sizes = []
    for seconds in [0.04] * 10 + [0.002] * 5 + [5.0] * 5:
        for _ in range(10):
            size = clock.left(prefetch)
            prefetch.record_claim(seconds)
            clock.start(size, 0.000999)
        sizes.append(clock.left(prefetch))
    assert sizes[9] == 120
    assert sizes[14] == 50, "one quick answer shows that it was the loop that held up the others"
    assert sizes[-1] == 200


def test_slow_start_counts_at_once_and_is_forgotten_soon(clock: Clock) -> None:
    prefetch = Prefetch(concurrency=1000, batch=500)
    clock.grow(prefetch)
    clock.start(1, 45.0)
    assert clock.left(prefetch) == 1
    assert clock.grow(prefetch) <= 10
    assert clock.left(prefetch) == 500


def test_suspending_steps_are_claimed_at_a_pace(clock: Clock) -> None:
    prefetch = Prefetch(concurrency=100, batch=500)
    sizes = []
    for _ in range(4):
        sizes.append(size := clock.left(prefetch))
        prefetch.record_claim(0.002)
        clock.start(size, 1e-5, ends=False)
        assert clock.left(prefetch) == 0
        assert 0 < prefetch.seconds_to_claim() <= 0.005
        clock.now += prefetch.seconds_to_claim()
    assert sizes == [1, 4, 16, 64]
    assert clock.left(prefetch, late=0.02) == 100
    prefetch.record_claim(0.002)
    clock.start(256, 1e-5, ends=False)
    clock.now += 1e-2
    assert prefetch._window == 256
    clock.left(prefetch, late=0.02)
    assert prefetch._window == 256, "a loop that is late is not free"
    clock.ended += 1
    prefetch.record_claim(0.002)
    assert clock.left(prefetch) > 0, "what they cost is known"


def test_pause_for_others_lasts_although_steps_end(clock: Clock) -> None:
    prefetch = Prefetch(concurrency=100, batch=500)
    prefetch.update_window(busy=0.0, started=1, ended=0, late=0.0, is_stuck=False)
    prefetch.pause_claims(1.25)
    prefetch.update_window(busy=0.001, started=2, ended=1, late=0.0, is_stuck=False)
    assert prefetch.seconds_to_claim() == 1.25
    assert prefetch.free_slots(1, 0) == 0


def test_stuck_worker_claims_one_task(clock: Clock) -> None:
    prefetch = Prefetch(concurrency=100, batch=500)
    clock.grow(prefetch)
    clock.left(prefetch, held=2, ready=1, is_stuck=True)
    clock.start(1, 1e-5, ends=False)
    for _ in range(5):
        assert clock.left(prefetch, held=1) == 1
        clock.left(prefetch, held=2, ready=1, is_stuck=True)
        clock.start(1, 1e-5)
    clock.start(2, 1e-5)
    assert clock.left(prefetch, held=1) == 2, "it goes up again when they do not"


def test_worker_without_free_threads_leaves_tasks_to_others(dsn: str, tmp_path: Path) -> None:
    rows = Rows(dsn)
    rows(MARKS)
    go = tmp_path / "go"
    with Fleet(dsn, "--concurrency", "3", app="poison:app") as fleet:
        fleet.until("worker.ready")
        put(dsn, *[poison.Overlong(str(go))] * 3)
        rows.until("SELECT count(*) = 3 FROM pg_task WHERE error LIKE '%longer than its timeout%'")
        fleet.send(signal.SIGTTIN)
        fleet.until("worker.ready")
        put(dsn, *(poison.Short(number) for number in range(50)))
        rows.until("SELECT count(*) = 50 FROM mark")
        go.touch()
        fleet.send(signal.SIGTERM)
        assert fleet.ends() == 0
    assert len(rows("SELECT DISTINCT pid FROM mark")) == 1


def test_shorter_pause_does_not_end_a_longer_one() -> None:
    prefetch = Prefetch(10, 10)
    prefetch.pause_claims(10.0)
    prefetch.pause_claims(0.01)
    assert prefetch.seconds_to_claim() > 5
