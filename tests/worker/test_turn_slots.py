"""Slots for turns: shared by the workers of one supervisor."""

from __future__ import annotations

import os
import signal
import sys

import pytest

from pgtask._worker import turn_slots
from pgtask._worker.turn_slots import TurnSlots


def take_in_child(slots: TurnSlots) -> tuple[int, bool]:
    """Fork a process that takes a slot and waits for a signal. Return its pid, and whether it got one."""
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.write(write, b"1" if slots.take() else b"0")
        signal.pause()
        os._exit(0)
    os.close(write)
    with open(read, "rb") as pipe:
        return pid, pipe.read(1) == b"1"


def end(pid: int) -> None:
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)


@pytest.mark.skipif(sys.platform != "linux", reason="forks in a test process")
def test_slot_is_taken_until_its_process_frees_it_or_dies(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(turn_slots, "default_procs", lambda: 1)
    slots = TurnSlots()
    children = [take_in_child(slots) for _ in range(3)]
    try:
        assert [got for _, got in children] == [True, True, False]
        assert not slots.take()
        end(children.pop(0)[0])
        assert slots.take()
        assert slots.take(), "a process takes one slot only"
        children.append(take_in_child(TurnSlots()))
        assert children[-1][1], "another supervisor has slots of its own"
        slots.free()
    finally:
        for pid, _ in children:
            end(pid)


def test_without_a_place_for_the_file_there_is_no_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(turn_slots, "_open_file", lambda: None)
    slots = TurnSlots()
    assert slots.take()
    slots.free()
