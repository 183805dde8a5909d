"""A real `pgtask-supervisor` under test, started like by a person and observed through its log and the database."""

from __future__ import annotations

import asyncio
import contextlib
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from types import TracebackType
from typing import Any

import asyncpg
import psutil
from paths import PYTHONPATH


class Fleet:
    """One supervisor and its workers, as a context manager that leaves no process behind."""

    def __init__(
        self, dsn: str | None, *arguments: str, app: str = "apps:app", procs: int = 1, path: str = PYTHONPATH
    ) -> None:
        self._path = path
        self._command = [
            *(sys.executable, "-W", "error", "-m", "pgtask._cli.supervisor", app),
            *("--procs", str(procs), *arguments),
            *(("--dsn", dsn) if dsn else ()),
        ]
        self.lines: list[str] = []
        self._fresh: queue.SimpleQueue[str | None] = queue.SimpleQueue()

    def on(self, host: Sequence[str]) -> None:
        """Start it by a command that runs another one, such as on a host of a switch."""
        self._command = [*host, *self._command]

    def __enter__(self) -> Fleet:
        self.process = subprocess.Popen(
            self._command,
            env={**os.environ, "PYTHONPATH": self._path, "PYTHONUNBUFFERED": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        self._reader = threading.Thread(target=self._read)
        self._reader.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        family = self.family() if self.process.poll() is None else []
        for process in [self.process, *family]:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        self.process.wait()
        psutil.wait_procs(family, timeout=10)
        assert self.process.stdout is not None
        self._reader.join(10)
        self.process.stdout.close()
        if error is not None:
            print("".join(self.lines))

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.lines.append(line)
            self._fresh.put(line)
        self._fresh.put(None)

    def until(self, text: str, times: int = 1, timeout: float = 45) -> str:
        """Wait until lines with `text` were printed so many times since the last call; return the last one."""
        deadline = time.monotonic() + timeout
        while True:
            try:
                line = self._fresh.get(timeout=max(0.01, deadline - time.monotonic()))
            except queue.Empty:
                raise AssertionError(f"{text!r} was not printed within {timeout} s") from None
            if line is None:
                raise AssertionError(f"the supervisor ended with {self.process.wait()} before it printed {text!r}")
            if text in line and (times := times - 1) == 0:
                return line

    def family(self) -> list[psutil.Process]:
        """Return the worker processes."""
        try:
            return list(psutil.Process(self.process.pid).children(recursive=True))
        except psutil.NoSuchProcess:
            return []

    def send(self, number: signal.Signals) -> None:
        self.process.send_signal(number)

    def ends(self, timeout: float = 60) -> int:
        """Wait for the end and read all output; return the exit code."""
        code = self.process.wait(timeout)
        self._reader.join(10)
        return code

    @property
    def output(self) -> str:
        return "".join(self.lines)


SHORT_LEASE = ("--lease-timeout", "4", "--heartbeat-interval", "0.5")
"""A lease whose end a test waits for. It bears a stall of the machine of three seconds."""


@contextlib.contextmanager
def ready(dsn: str, *arguments: str, procs: int = 1, app: str = "apps:app") -> Iterator[Fleet]:
    """Yield a fleet whose workers are all ready; at the end it is killed if it has not stopped."""
    with Fleet(dsn, *arguments, procs=procs, app=app) as fleet:
        fleet.until("worker.ready", times=procs)
        yield fleet


@contextlib.contextmanager
def working(
    dsn: str, *arguments: str, procs: int = 1, app: str = "apps:app", order: signal.Signals = signal.SIGTERM
) -> Iterator[Fleet]:
    """Yield a fleet whose workers are all ready; at the end it must stop by the signal `order`, and leave nothing."""
    with ready(dsn, *arguments, procs=procs, app=app) as fleet:
        yield fleet
        stop(fleet, dsn, order)


def burst(dsn: str, *arguments: str, procs: int = 1, app: str = "apps:app", code: int = 0) -> Fleet:
    """Run a burst to its end, which must have this exit code; nothing may be left."""
    with Fleet(dsn, "--burst", *arguments, procs=procs, app=app) as fleet:
        assert fleet.ends(120) == code, fleet.output
        assert_nothing_is_left(fleet, dsn)
    return fleet


def stop(fleet: Fleet, dsn: str, order: signal.Signals = signal.SIGTERM, code: int = 0) -> None:
    """Stop the fleet, unless it has stopped; no process, no connection and no lease may be left."""
    if fleet.process.poll() is None:
        until_none(lambda: [process for process in fleet.family() if is_zombie(process)])
        fleet.send(order)
        assert fleet.ends() == code, fleet.output
    assert_nothing_is_left(fleet, dsn)


def assert_nothing_is_left(fleet: Fleet, dsn: str) -> None:
    """Check a fleet that has ended. `stop` counts its zombies before; afterwards init reaps them."""
    until_none(lambda: [process for process in of_session(fleet.process.pid) if is_alive(process)])
    connections = (
        "SELECT array_agg(application_name) FROM pg_stat_activity "
        "WHERE datname = current_database() AND application_name ~ '^pgtask'"
    )
    rows = Rows(dsn)
    rows.until(connections, holds=lambda names: names is None)
    if fleet.process.returncode >= 0:  # a killed supervisor starts no reaper
        assert rows.value("SELECT count(*) FROM pg_task WHERE locked_by IS NOT NULL") == 0, "a lease is left"


def until_none(look: Callable[[], list[psutil.Process]], patience: float = 30) -> None:
    deadline = time.monotonic() + patience
    while left := look():
        assert time.monotonic() < deadline, f"left: {left}"
        time.sleep(0.005)


def of_session(leader: int) -> list[psutil.Process]:
    """Return the processes of a fleet and their descendants, by the session that it was started with."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(ProcessLookupError, PermissionError):
            if os.getsid(process.pid) == leader:
                found.append(process)
    return found


def is_zombie(process: psutil.Process) -> bool:
    try:
        return bool(process.status() == psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


def is_alive(process: psutil.Process) -> bool:
    try:
        return bool(process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


class Rows:
    """The database as an operator sees it."""

    def __init__(self, dsn: str) -> None:
        self._dsn = dsn

    def __call__(self, query: str, *args: Any) -> list[Any]:
        """Run one statement on a connection of its own."""

        async def fetch() -> list[Any]:
            connection = await asyncpg.connect(self._dsn)
            try:
                return list(await connection.fetch(query, *args))
            finally:
                await connection.close()

        return asyncio.run(fetch())

    def value(self, query: str, *args: Any) -> Any:
        return self(query, *args)[0][0]

    def until(self, query: str, *args: Any, holds: Callable[[Any], bool] = bool, timeout: float = 45) -> Any:
        """Repeat the query until its value satisfies `holds`; return the value."""

        async def poll() -> Any:
            connection = await asyncpg.connect(self._dsn)
            try:
                async with asyncio.timeout(timeout):
                    while not holds(value := await connection.fetchval(query, *args)):
                        await connection.fetch("SELECT pg_sleep(0.02)")
                return value
            finally:
                await connection.close()

        return asyncio.run(poll())


def put(dsn: str, *steps: Any, **options: Any) -> Any:
    """Enqueue steps and return their ids."""
    from pgtask import Client

    async def enqueue() -> Any:
        async with Client(dsn) as client:
            return await client.enqueue_many(steps, **options)

    return asyncio.run(enqueue())
