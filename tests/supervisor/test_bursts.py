"""Bursts under a real supervisor: their sums, their progress line and their summary."""

from __future__ import annotations

import contextlib
import json
import os
import pty
import signal
from pathlib import Path

import pytest
from fix_supervisor import Start

from pgtask._cli.progress import ERASE_LINE, burst_notes, burst_summary, progress_line
from pgtask._status import MAX_PARKED, Totals

pytestmark = pytest.mark.timeout(120)


def test_burst_replaces_killed_worker_and_sums_up_all(start: Start) -> None:
    fleet = start("bursts", procs=2, burst=True)
    assert fleet.end() == 1, "some task is parked"
    assert json.loads(fleet.output()[-1]) == {"done": 27, "steps": 81, "finished": True}
    assert fleet.count("log worker.exited .*reason=burst") == 2


@pytest.mark.parametrize(
    ("order", "code"),
    [(signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGQUIT, 131)],
    ids=lambda value: str(value),
)
def test_stopped_burst_is_not_finished(start: Start, order: signal.Signals, code: int) -> None:
    fleet = start("obedient", procs=2, burst=True)
    fleet.ready(2)
    fleet.signal(order)
    assert fleet.end() == code
    assert json.loads(fleet.output()[-1])["finished"] is False


def test_burst_stopped_by_notification_exits_with_143(start: Start) -> None:
    assert start("is_notified", procs=2, burst=True).end() == 143


def test_progress_is_erased_before_other_lines_and_at_end(start: Start) -> None:
    terminal, stderr = pty.openpty()
    try:
        fleet = start("bursts", procs=2, burst=True, progress=True, stderr=stderr)
        assert fleet.end() == 1
        written = os.read(terminal, 65536).decode()
    finally:
        os.close(terminal)
        os.close(stderr)
    assert "tasks done" in written
    *lines, rest = written.split("\r\n")
    assert not rest
    for line in lines:
        assert line.startswith(ERASE_LINE), line
        assert "tasks done" not in line.rsplit(ERASE_LINE, 1)[-1], "nothing is written behind the progress"


def test_lines_of_workers_stay_whole_beside_progress(start: Start) -> None:
    terminal, ours = pty.openpty()
    fleet = start("prints", procs=2, burst=True, progress=True, stdout=ours, stderr=ours)
    os.close(ours)
    written = b""
    with open(terminal, "rb", buffering=0) as stream, contextlib.suppress(OSError):  # Linux: when all have closed it
        while chunk := stream.read(65536):
            written += chunk
    assert fleet.end() == 0
    *lines, rest = [line.rpartition(ERASE_LINE)[2] for line in written.decode().split("\r\n")]
    assert not rest
    for number in range(100):
        assert lines.count(f"line {number}") == 2
        assert lines.count(f"error {number}") == 2
    assert "tasks done" in written.decode()


@pytest.mark.parametrize("unbuffered", [False, True])
def test_progress_keeps_incomplete_line_of_worker(
    start: Start, monkeypatch: pytest.MonkeyPatch, unbuffered: bool
) -> None:
    if unbuffered:
        monkeypatch.setenv("PYTHONUNBUFFERED", "1")
    terminal, ours = pty.openpty()
    fleet = start("prints_in_two", procs=1, burst=True, progress=True, stdout=ours, stderr=ours)
    os.close(ours)
    written = b""
    with open(terminal, "rb", buffering=0) as stream, contextlib.suppress(OSError):
        while chunk := stream.read(65536):
            written += chunk
            if b"the beginning" in written and b"8 steps" in written.partition(b"the beginning")[2]:
                (Path(fleet.errors.name).parent / "drawn").touch()
    assert fleet.end() == 0
    lines = [line.rpartition(ERASE_LINE)[2] for line in written.decode().split("\r\n")]
    assert "the beginning" in lines
    assert "the end" in lines


def test_progress_line() -> None:
    now, before = Totals(done=12_000, steps=36_000, errors=1), Totals(done=2_000, steps=6_000)
    assert progress_line(now, before, 5.0, 100_000) == (
        "12%  ~0:44 left  12,000 of 100,000 tasks done  1 error  6,000 steps/s  36,000 steps"
    )
    assert progress_line(now, before, 5.0, None) == "12,000 tasks done  1 error  6,000 steps/s  36,000 steps"
    assert progress_line(now, now, 5.0, 100_000).startswith("12%  12,000 of"), "no rate to estimate from"
    slow = Totals(done=2_001, steps=6_001)
    assert progress_line(slow, before, 5.0, 100_000).startswith("2%  2,001 of"), "no rate to estimate from"
    assert progress_line(now, before, 5.0, 11_999).startswith("12,000 tasks done"), "more tasks came after the count"
    assert progress_line(Totals(), Totals(), 5.0, 0).startswith("0 tasks done"), "no task was due"
    assert "  ~5:00:00 left  " in progress_line(Totals(done=10_000), Totals(), 5.0, 36_010_000)


@pytest.mark.parametrize("width", range(4, 100))
def test_progress_drops_whole_fields_on_narrow_terminal(width: int) -> None:
    now, before = Totals(done=8_887, steps=18_176, errors=18, parked=3), Totals()
    whole = progress_line(now, before, 5.0, 20_000)
    line = progress_line(now, before, 5.0, 20_000, width=width)
    assert len(line) <= width
    assert (whole + "  ").startswith(line + "  ")


def test_progress_shows_errors_in_red() -> None:
    totals = Totals(done=5, steps=8, errors=2)
    line = progress_line(totals, Totals(), 1.0, None, width=20, color=True)
    assert line == "5 tasks done", "what does not fit leaves no color behind"
    line = progress_line(totals, Totals(), 1.0, None, color=True)
    assert line == "5 tasks done  \x1b[31m2 errors\x1b[m  8 steps/s  8 steps"


def test_progress_counts_parked_tasks_as_settled_not_done() -> None:
    now, before = Totals(done=6_000, parked=6_000), Totals(done=1_000, parked=1_000)
    assert progress_line(now, before, 5.0, 100_000) == (
        "12%  ~0:44 left  6,000 of 100,000 tasks done  6,000 parked  0 steps/s  0 steps"
    )
    assert progress_line(now, now, 5.0, 11_999).startswith("6,000 tasks done  6,000 parked")


def test_burst_summary() -> None:
    totals = Totals(done=100_000, steps=300_000)
    assert burst_summary(totals, 12.3, finished=True, parked_left=0, style="text") == (
        "burst finished: 100,000 tasks done, 300,000 steps, 0 errors in 12.3 s (24,390 steps/s)"
    )
    totals = Totals(done=1, steps=2, errors=1, parked=3, put_back=2)
    assert burst_summary(totals, 2.0, finished=False, parked_left=4, style="text") == (
        "burst stopped: 1 task done, 3 parked, 2 steps, 1 error in 2.0 s (1 steps/s)"
    )
    assert json.loads(burst_summary(totals, 0.0, finished=True, parked_left=4, style="json")) == {
        "event": "burst.finished",
        "tasks": 1,
        "steps": 2,
        "errors": 1,
        "parked": 3,
        "parked_left": 4,
        "parked_others": 0,
        "put_back": 2,
        "paused": [],
        "seconds": 0.0,
        "steps_per_second": 0,
    }


def test_burst_notes_name_command_that_lists_parked() -> None:
    def notes(put_back: int = 0, parked_left: int = 0, parked: int = 0, others: int = 0) -> list[str]:
        totals = Totals(put_back=put_back, parked=parked)
        return list(burst_notes(totals, parked_left=parked_left, parked_others=others))

    look = "pgtask list --state parked"
    assert notes() == []
    assert notes(1, 1, parked=1) == [
        f"1 task is parked with an error: {look}",
        "1 time a worker put a task back, since this app lacks its step: pgtask list --state scheduled",
    ]
    assert notes(2, MAX_PARKED) == [
        f"100,000 or more tasks are parked with an error: {look}",
        "2 times a worker put a task back, since this app lacks its step: pgtask list --state scheduled",
    ]
    assert notes(parked_left=2, parked=5) == [f"2 tasks are parked with an error: {look}"]
    assert notes(parked_left=3) == [f"3 tasks are parked with an error, since before this burst: {look}"]
    assert notes(parked_left=3, parked=1) == [
        f"3 tasks are parked with an error, 2 of them since before this burst: {look}"
    ]
    assert notes(others=1) == [f"1 task of other apps is parked too, which is not counted: {look}"]
