"""A fleet, a client and a consumer behind a real pgbouncer, all of them at work, and what must hold of them."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Coroutine, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar
from uuid import UUID

import ticking
from fix_pgbouncer import Bouncer
from fleet import Fleet, Rows
from paths import PYTHONPATH
from ticking import Once, Tick

from pgtask import Client
from pgtask.errors import DatabaseUnavailable

T = TypeVar("T")
SOON = 15.0
"""Seconds within which all go on when the cause is over: a pause of a link (5 s at most), one of the pooler (a second
as we configure it), and a machine that is busy."""

TICKS = 4


class Loop:
    """An event loop in a thread of its own, so that a test can go on while a client waits."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever)
        self._thread.start()

    def begin(self, coroutine: Coroutine[Any, Any, T]) -> Any:
        """A `concurrent.futures.Future` of it."""
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop)

    def __call__(self, coroutine: Coroutine[Any, Any, T], timeout: float = 60) -> T:
        """Run it to its end."""
        result: T = self.begin(coroutine).result(timeout)
        return result

    def close(self) -> None:
        self(_cancel_others())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)
        self._loop.close()


class Scene:
    """The parts at work: see `at_work`."""

    def __init__(self, bouncer: Bouncer, fleet: Fleet, rows: Rows, loop: Loop, client: Client, go: Path) -> None:
        self.bouncer, self.fleet, self.rows, self.loop, self.client = bouncer, fleet, rows, loop, client
        self._go = go
        self._writes = True
        self.accepted: set[int] = set()
        """The numbers of the tasks that the client was told to be in the table."""
        self._consumer: Any = None
        self._tried = 0
        self._unavailable: list[str] = []

    def begin(self) -> None:
        self.ticks: list[UUID] = list(self.loop(self.client.enqueue_many([Tick(str(self._go))] * TICKS)))
        self._run = self.loop(self.client.trigger(ticking.ticking, str(self._go)))
        self._result = self.loop.begin(self._run.result())
        self._writer = self.loop.begin(self._write())
        self._consumer = self.client.consumer("elsewhere")
        self.loop(self._consumer.__aenter__())
        self.loop(self.client.enqueue(Once(0), queue="elsewhere"))
        self._leases = self.loop(self._consumer.claim(1, wait=timedelta(seconds=20)))
        assert self.loop(self._consumer.extend(self._leases, timedelta(minutes=10))) == []
        self._claim = self.loop.begin(self._consumer.claim(1, wait=timedelta(minutes=5)))
        self.goes_on()

    async def _write(self) -> None:
        """Enqueue one task after the other, waiting for what is away; anything else that is raised is a failure."""
        while self._writes:
            self._tried += 1
            try:
                await self.client.enqueue(Once(self._tried))
            except DatabaseUnavailable as error:
                self._unavailable.append(str(error))
                await asyncio.sleep(0.2)
            else:
                self.accepted.add(self._tried)
                await asyncio.sleep(0.02)

    @property
    def unavailable(self) -> list[str]:
        """The errors of the client meanwhile."""
        return list(self._unavailable)

    def until_unavailable(self, text: str = "", timeout: float = 30) -> None:
        """Wait until the client has raised an error with this text."""
        deadline = time.monotonic() + timeout
        while not any(text in error for error in self._unavailable):
            assert time.monotonic() < deadline, self._unavailable
            self.loop(asyncio.sleep(0.02))

    def goes_on(self, within: float = SOON) -> None:
        """From now on and in so many seconds, each chain has moved on, the run has recorded, and the client has
        enqueued."""
        until = time.monotonic() + within
        steps = "SELECT count(*) FROM pg_task_checkpoints WHERE run = $1"
        before, recorded, accepted = self._moves(), self.rows.value(steps, self._run.id), len(self.accepted)
        moved = "SELECT count(*) FROM ledger WHERE task = $1"
        for task in self.ticks:
            goal = before.get(task, 0) + 3
            self.rows.until(moved, task, holds=goal.__le__, timeout=until - time.monotonic())
        self.rows.until(
            steps, self._run.id, holds=lambda count: count > recorded, timeout=max(0.1, until - time.monotonic())
        )
        while len(self.accepted) <= accepted:
            assert time.monotonic() < until, f"the client does not go on: {self._unavailable[-1:]}"
            self.loop(asyncio.sleep(0.02))

    def _moves(self) -> dict[UUID, int]:
        return dict(self.rows("SELECT task, count(*) FROM ledger WHERE task = ANY ($1) GROUP BY task", self.ticks))

    def finish(self) -> None:
        """All comes to its end: nothing was lost, and no outcome took effect twice."""
        self._writes = False
        self.loop(_wait(self._writer))
        self.loop(self.client.enqueue(Once(0), queue="elsewhere"))
        self._leases += self.loop(_wait(self._claim))
        assert len(self._leases) == 2
        assert self.loop(self._consumer.done(self._leases)) == [], "the lease of the consumer was lost"
        self.loop(self._consumer.__aexit__(None, None, None))
        self._go.touch()
        steps = self.loop(_wait(self._result))
        assert self.rows.value("SELECT count(*) FROM pg_task_checkpoints WHERE run = $1", self._run.id) >= steps
        self.rows.until("SELECT count(*) = 0 FROM pg_task")
        assert_each_once(self.rows, self.ticks)
        twice = self.rows("SELECT task, step FROM ledger GROUP BY task, step HAVING count(*) > 1")
        assert twice == []
        once = "SELECT (step::json->'Ticking'->'Once'->>'number')::integer FROM ledger WHERE step ~ '\"Once\"'"
        done = {row[0] for row in self.rows(once)}
        assert self.accepted <= done, "a task is lost"

    async def abandon(self) -> None:
        """Cut the connections, in the middle of any statement."""
        if self.client._postgres._pool is not None:
            self.client._postgres._pool.terminate()  # first: asyncpg waits for the server to cancel what is under way
        if self._consumer is not None:
            self._consumer._link.drop()
            await asyncio.to_thread(self._consumer._renew.stop)
        await _cancel_others()

    def command(self, *words: str, timeout: float = 40) -> subprocess.CompletedProcess[str]:
        return command(self.bouncer, *words, timeout=timeout)


def assert_each_once(rows: Rows, ticks: list[UUID]) -> None:
    """Each step of these chains has had its outcome, and no step twice."""
    chains = rows(
        "SELECT count(*), count(DISTINCT step), max((step::json->'Ticking'->'Tick'->>'number')::integer) "
        "FROM ledger WHERE task = ANY ($1) GROUP BY task",
        ticks,
    )
    assert len(chains) == len(ticks)
    for outcomes, distinct, last in chains:
        assert outcomes == distinct == last + 1, "a step was passed over, or took effect twice"


async def _cancel_others() -> None:
    others = asyncio.all_tasks() - {asyncio.current_task()}
    for task in others:
        task.cancel()
    await asyncio.gather(*others, return_exceptions=True)


async def _wait(future: Any) -> Any:
    async with asyncio.timeout(60):
        return await asyncio.wrap_future(future)


def command(bouncer: Bouncer, *words: str, timeout: float = 40) -> subprocess.CompletedProcess[str]:
    """Run a command of `pgtask` behind the pooler."""
    return subprocess.run(
        [sys.executable, "-m", "pgtask", *words],
        env={**os.environ, "PYTHONPATH": PYTHONPATH, "PGTASK_DSN": bouncer.dsn, "PGTASK_NO_LISTEN": "1"},
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )


def open_ledger(bouncer: Bouncer) -> Rows:
    """Have each outcome noted; the database past the pooler."""
    bouncer.server.execute(ticking.LEDGER, dsn=bouncer.direct)
    return Rows(bouncer.direct)


@contextlib.contextmanager
def at_work(bouncer: Bouncer, go: Path, *arguments: str, procs: int = 2) -> Iterator[Scene]:
    """Two workers with `--no-listen`, with chains and a run under way; a client that enqueues one task after the other
    and waits for the result of the run; and a consumer that holds a lease. What the test does to them is over at its
    end: then all of it comes to its end, once, and the fleet stops with 0."""
    rows = open_ledger(bouncer)
    loop = Loop()
    with contextlib.ExitStack() as stack:
        stack.callback(loop.close)
        client = Client(bouncer.dsn, app=ticking.app)
        fleet = stack.enter_context(
            Fleet(bouncer.dsn, "--no-listen", "--queue", "default", *arguments, app="ticking:app", procs=procs)
        )
        fleet.until("worker.ready", times=procs)
        loop(client.__aenter__())
        scene = Scene(bouncer, fleet, rows, loop, client, go)
        scene.begin()
        try:
            yield scene
            scene.finish()
        except BaseException:  # its error counts, and not what else this leaves behind
            loop(scene.abandon())
            raise
        loop(client.__aexit__(None, None, None))
        fleet.send(signal.SIGTERM)
        assert fleet.ends() == 0, fleet.output
        assert "Traceback" not in fleet.output
        assert rows.value("SELECT count(*) FROM pg_task WHERE locked_by IS NOT NULL") == 0
