"""The protocol of systemd, over a real socket."""

from __future__ import annotations

import os
import signal
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from counted import Awaits
from exported import APP
from fleet import Fleet, Rows, put, stop

from pgtask._supervisor.sd_notify import SdNotify


@pytest.fixture
def manager(tmp_path: Path) -> Iterator[socket.socket]:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as receiver:
        receiver.bind(str(tmp_path / "notify"))
        receiver.settimeout(30)
        yield receiver


def path(manager: socket.socket) -> str:
    return str(manager.getsockname())


def test_a_fleet_says_ready_then_lives_then_stops(
    dsn: str, rows: Rows, manager: socket.socket, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NOTIFY_SOCKET", path(manager))
    monkeypatch.setenv("WATCHDOG_USEC", "600000")
    put(dsn, Awaits(seconds=1))
    with Fleet(dsn, app=APP) as fleet:
        said = []
        while "READY=1" not in said:
            said.append(manager.recv(100).decode())
        assert "worker.ready" in fleet.output or fleet.until("worker.ready")
        began = time.monotonic()
        assert [manager.recv(100) for _ in range(5)] == [b"WATCHDOG=1"] * 5
        assert 0.5 < time.monotonic() - began < 3, "five signs of life at a third of 0.6 s"
        fleet.send(signal.SIGTERM)
        while (heard := manager.recv(100)) == b"WATCHDOG=1":
            pass
        assert heard == b"STOPPING=1"
        stop(fleet, dsn)


def test_a_supervisor_without_progress_sends_nothing(
    dsn: str, manager: socket.socket, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NOTIFY_SOCKET", path(manager))
    monkeypatch.setenv("WATCHDOG_USEC", "600000")
    with Fleet(dsn, app=APP) as fleet:
        fleet.until("worker.ready")
        fleet.send(signal.SIGSTOP)
        manager.settimeout(1)
        with pytest.raises(TimeoutError):
            hear_on(manager)
        fleet.send(signal.SIGCONT)


def hear_on(manager: socket.socket) -> None:
    while manager.recv(100):
        pass


def test_no_child_inherits_the_variables(manager: socket.socket) -> None:
    environ = {
        "NOTIFY_SOCKET": path(manager),
        "WATCHDOG_USEC": "1000000",
        "WATCHDOG_PID": str(os.getpid()),
        "HOME": "/",
    }
    notify = SdNotify(environ)
    assert environ == {"HOME": "/"}
    notify.note_ready()
    notify.note_ready()
    notify.advance(100.0)
    notify.advance(100.1)
    notify.note_stopping()
    assert [manager.recv(100) for _ in range(3)] == [b"READY=1", b"WATCHDOG=1", b"STOPPING=1"]


@pytest.mark.parametrize(
    "environ",
    [{}, {"NOTIFY_SOCKET": "/no/such"}, {"NOTIFY_SOCKET": "x"}, {"NOTIFY_SOCKET": "@"}, {"WATCHDOG_USEC": "1000"}],
)
def test_without_a_manager_it_does_nothing(environ: dict[str, str]) -> None:
    notify = SdNotify(environ)
    notify.note_ready()
    assert notify.next_at == float("inf")


def test_the_watchdog_of_another_process_is_not_ours(manager: socket.socket) -> None:
    notify = SdNotify({"NOTIFY_SOCKET": path(manager), "WATCHDOG_USEC": "1000000", "WATCHDOG_PID": "1"})
    assert notify.next_at == float("inf")


def test_an_abstract_socket_is_reached() -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as receiver:
        receiver.bind(f"\0pgtask-{os.getpid()}")
        receiver.settimeout(5)
        SdNotify({"NOTIFY_SOCKET": f"@pgtask-{os.getpid()}"}).note_ready()
        assert receiver.recv(100) == b"READY=1"
