"""What a worker claims ahead, and what it does not claim because it could not start it."""

from __future__ import annotations

import signal
from pathlib import Path

import apps
import poison
import pytest
from fleet import Fleet, Rows, put

from pgtask._worker.room import PREFETCH, STALE_AFTER, Room


def test_what_is_claimed_ahead_follows_the_rate_and_ends_with_it(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 1000.0
    monkeypatch.setattr("time.monotonic", lambda: now)
    room = Room(concurrency=10, batch=500)
    assert room.left(held=0, ready=0) == 10
    for _ in range(100):
        now += 0.125
        room.count(1000)
    assert room.left(held=0, ready=0) == 10 + round(8_000 * PREFETCH)
    assert room.left(held=400, ready=0) == 10
    now += STALE_AFTER
    assert room.left(held=10, ready=0) == 0, "nothing has ended for a while: what is claimed ahead would only wait"
    now += 0.125
    room.count(1000)
    assert room.left(held=10, ready=0) > 0


def test_a_worker_whose_threads_are_all_given_up_leaves_the_tasks_to_others(dsn: str, tmp_path: Path) -> None:
    rows = Rows(dsn)
    rows(apps.MARKS)
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
