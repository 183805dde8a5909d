"""Behind a real pgbouncer in transaction mode: whatever fails in it or behind it, the fleet waits and goes on.

Each test takes something away from a fleet, a client and a consumer that are at work, gives it back, and holds them to
the promise: nothing is lost, no outcome takes effect twice, all go on within seconds, and the fleet stops with 0.
"""

from __future__ import annotations

import asyncio
import re
import signal
from pathlib import Path

import asyncpg
import pytest
from fix_database import run
from fix_pgbouncer import Bouncer
from fleet import Fleet, put
from scene import SOON, Scene, assert_each_once, at_work, command, open_ledger
from ticking import Once, Tick

from pgtask import Client
from pgtask.errors import DatabaseRefused, DatabaseUnavailable

pytestmark = pytest.mark.usefixtures("without_listen")


@pytest.fixture
def without_listen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PGTASK_NO_LISTEN", "1")


ONCE = '{"Ticking":{"Once":{"number":%s}}}'
SLOW_CLAIM = """
CREATE FUNCTION hold() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    PERFORM pg_advisory_xact_lock_shared(7);
    RETURN NEW;
END$$;
CREATE TRIGGER hold BEFORE UPDATE ON pg_task FOR EACH ROW WHEN (OLD.locked_by IS NULL AND NEW.locked_by IS NOT NULL)
    EXECUTE FUNCTION hold();
"""


@pytest.fixture
def go(tmp_path: Path) -> Path:
    return tmp_path / "go"


def test_a_fleet_works_behind_pgbouncer(bouncer: Bouncer, go: Path) -> None:
    bouncer.start()
    with at_work(bouncer, go) as scene:
        scene.goes_on()
    assert scene.unavailable == []


# --- the server is away


@pytest.mark.faults
@pytest.mark.parametrize("login_retry", [1, 15])
def test_a_server_restarted_behind_pgbouncer_is_waited_for(bouncer: Bouncer, go: Path, login_retry: int) -> None:
    bouncer.configure(server_login_retry=login_retry)
    bouncer.start()
    with at_work(bouncer, go) as scene:
        bouncer.server.stop()
        scene.fleet.until("database.unavailable")  # the other worker, or the client, may wait in pgbouncer
        for worker in scene.fleet.family():  # pgbouncer lets in those that follow them, and fails their first query
            worker.kill()
        scene.fleet.until("database.unavailable", times=2)
        refused = scene.command("stats")
        assert refused.returncode
        assert_one_line(refused.stderr)
        scene.fleet.until("database.waiting")
        bouncer.server.start()
        scene.goes_on(within=login_retry + SOON)
        assert scene.command("stats").returncode == 0


@pytest.mark.faults
def test_pgbouncer_restarted_is_waited_for(bouncer: Bouncer, go: Path) -> None:
    bouncer.start()
    with at_work(bouncer, go) as scene:
        for _ in range(3):
            bouncer.restart()
            scene.goes_on()
        bouncer.kill()
        scene.fleet.until("database.unavailable")
        scene.until_unavailable()
        bouncer.start()
        scene.goes_on()


@pytest.mark.faults
def test_pgbouncer_restarted_in_an_outage_is_waited_for(bouncer: Bouncer, go: Path) -> None:
    bouncer.start()
    with at_work(bouncer, go) as scene:
        bouncer.server.stop()
        scene.fleet.until("database.unavailable")
        bouncer.restart()
        scene.fleet.until("database.waiting")
        scene.until_unavailable("TimeoutError")  # pgbouncer knows nothing of the server yet, and holds who logs in
        for worker in scene.fleet.family():  # those that follow them boot in the middle of the outage
            worker.kill()
        scene.fleet.until("database.unavailable", times=2)
        bouncer.server.start()
        scene.goes_on()


@pytest.mark.faults
def test_workers_boot_when_the_server_behind_pgbouncer_is_back(bouncer: Bouncer) -> None:
    bouncer.server.stop()
    bouncer.start()
    with Fleet(bouncer.dsn, "--no-listen", app="ticking:app", procs=2) as fleet:
        fleet.until("database.unavailable", times=2)
        fleet.until("database.waiting")
        refused = command(bouncer, "stats")
        assert refused.returncode
        assert_one_line(refused.stderr)
        bouncer.server.start()
        fleet.until("worker.ready", times=2)
        fleet.send(signal.SIGTERM)
        assert fleet.ends() == 0, fleet.output
    assert "worker.refused" not in fleet.output


# --- pgbouncer is full, slow or paused


@pytest.mark.faults
def test_a_full_pgbouncer_delays_a_replacement(bouncer: Bouncer, go: Path) -> None:
    bouncer.start()
    with at_work(bouncer, go) as scene:
        bouncer.set("max_client_conn", bouncer.clients())
        scene.fleet.send(signal.SIGHUP)
        assert "max_client_conn" in scene.fleet.until("database.unavailable")
        with pytest.raises(DatabaseUnavailable, match="max_client_conn"):
            run(open_client(bouncer))
        refused = scene.command("stats")
        assert refused.returncode
        assert "max_client_conn" in assert_one_line(refused.stderr)
        assert "max_client_conn" in scene.fleet.until("database.waiting")
        scene.goes_on()  # the workers of before
        bouncer.set("max_client_conn", 200)
        scene.fleet.until("reload.done")
        run(open_client(bouncer))


@pytest.mark.faults
def test_a_full_pgbouncer_delays_a_worker(bouncer: Bouncer, go: Path) -> None:
    bouncer.start()
    with at_work(bouncer, go) as scene:
        bouncer.set("max_client_conn", 1)
        victim, *_ = scene.fleet.family()
        victim.kill()
        assert "max_client_conn" in scene.fleet.until("database.unavailable")
        scene.fleet.send(signal.SIGTTIN)
        scene.fleet.until("database.unavailable")
        bouncer.set("max_client_conn", 200)
        scene.fleet.until("worker.ready", times=2)
        scene.goes_on()


@pytest.mark.faults
def test_a_pool_of_pgbouncer_in_use_is_waited_for(bouncer: Bouncer, go: Path) -> None:
    """Another client holds the only one, in a transaction, for longer than `query_wait_timeout`."""
    bouncer.configure(query_wait_timeout=2, default_pool_size=1)
    bouncer.start()

    async def hold(scene: Scene) -> None:
        connection = await asyncpg.connect(bouncer.dsn, statement_cache_size=0)
        async with connection.transaction():
            await connection.fetchval("SELECT 1")
            for _ in range(3):
                await asyncio.to_thread(scene.fleet.until, "query_wait_timeout", timeout=30)
            await asyncio.to_thread(scene.until_unavailable, "query_wait_timeout")
            refused = await asyncio.to_thread(scene.command, "stats")
            assert refused.returncode
            assert "query_wait_timeout" in assert_one_line(refused.stderr)
        await connection.close()

    with at_work(bouncer, go) as scene:
        run(hold(scene))
        scene.goes_on()


@pytest.mark.faults
def test_pgbouncer_that_reconnects_is_waited_for(bouncer: Bouncer, go: Path) -> None:
    bouncer.start()
    with at_work(bouncer, go) as scene:
        for _ in range(3):
            bouncer.reconnect()
            scene.goes_on()


@pytest.mark.faults
@pytest.mark.timeout(240)
def test_pgbouncer_paused_beyond_a_deadline_is_waited_for(bouncer: Bouncer, go: Path) -> None:
    """A statement is given up after 35 s, and so its worker says that the database is away."""
    bouncer.start()
    with at_work(bouncer, go) as scene:
        bouncer.pause()
        scene.fleet.until("database.unavailable", timeout=60)
        bouncer.resume()
        scene.goes_on()


@pytest.mark.faults
def test_pgbouncer_paused_for_a_moment_is_not_noticed(bouncer: Bouncer, go: Path) -> None:
    bouncer.start()
    with at_work(bouncer, go) as scene:
        bouncer.pause()
        bouncer.until_waiting(2)
        bouncer.resume()
        scene.goes_on()
    assert scene.unavailable == []


# --- passwords


@pytest.mark.faults
def test_a_password_that_the_server_refuses_pgbouncer_passes(bouncer: Bouncer, go: Path) -> None:
    bouncer.start()
    with at_work(bouncer, go) as scene:
        bouncer.server.set_password("rotated")
        bouncer.reconnect()
        scene.fleet.until("database.unavailable")
        for worker in scene.fleet.family():
            worker.kill()
        scene.fleet.until("database.unavailable", times=2)
        bouncer.know_password("rotated")
        bouncer.reload()
        scene.goes_on()


@pytest.mark.faults
def test_a_password_wrong_for_seconds_costs_no_fleet(bouncer: Bouncer, go: Path) -> None:
    """That refuses the workers. They were ready, so they are started again, for a minute."""
    bouncer.configure(auth_type="scram-sha-256")
    bouncer.start()
    rows = open_ledger(bouncer)
    with Fleet(bouncer.dsn, "--no-listen", app="ticking:app", procs=2) as fleet:
        fleet.until("worker.ready", times=2)
        ticks = put(bouncer.direct, *[Tick(str(go))] * 4)
        rows.until("SELECT count(*) > 20 FROM ledger")
        bouncer.know_password("rotated")
        bouncer.restart()
        fleet.until("worker.refused", times=6)
        bouncer.know_password("right")
        bouncer.reload()
        fleet.until("worker.ready", times=2)
        go.touch()
        rows.until("SELECT count(*) = 0 FROM pg_task", timeout=SOON)
        fleet.send(signal.SIGTERM)
        assert fleet.ends() == 0, fleet.output
    assert_each_once(rows, ticks)


def test_a_wrong_password_for_pgbouncer_is_refused(bouncer: Bouncer) -> None:
    bouncer.configure(auth_type="scram-sha-256")
    bouncer.know_password("another")
    bouncer.start()
    with pytest.raises(DatabaseRefused, match="authentication failed"):
        run(open_client(bouncer))
    with Fleet(bouncer.dsn, "--no-listen", app="ticking:app") as fleet:
        assert fleet.ends() == 5, fleet.output


# --- a worker dies


@pytest.mark.faults
def test_leases_of_a_killed_worker_are_released_behind_pgbouncer(bouncer: Bouncer, go: Path) -> None:
    """Its sessions are those of pgbouncer. The leases would be good for a minute."""
    bouncer.start()
    with at_work(bouncer, go) as scene:
        for _ in range(6):
            kill_one(scene.fleet)
            scene.goes_on()


@pytest.mark.faults
def test_workers_killed_behind_pgbouncer_lose_nothing(bouncer: Bouncer) -> None:
    """Each dies with hundreds of leases, at any point of a claim or a flush."""
    bouncer.start()
    rows = open_ledger(bouncer)
    with Fleet(bouncer.dsn, "--no-listen", app="ticking:app", procs=2) as fleet:
        fleet.until("worker.ready", times=2)
        for number in range(8):
            rows("INSERT INTO pg_task (step) SELECT format($1, n) FROM generate_series(1, 5000) AS n", ONCE)
            done = rows.value("SELECT count(*) FROM ledger")
            rows.until("SELECT count(*) > $1 FROM ledger", min(done + 100 + 37 * number, 5000 * number + 4000))
            kill_one(fleet)
        rows.until("SELECT count(*) = 0 FROM pg_task", timeout=40)
        fleet.send(signal.SIGTERM)
        assert fleet.ends() == 0, fleet.output
    assert rows.value("SELECT count(*) FROM ledger") == 40000
    assert rows.value("SELECT count(DISTINCT task) FROM ledger") == 40000


@pytest.mark.faults
def test_a_claim_of_a_worker_that_died_is_rolled_back(bouncer: Bouncer) -> None:
    """The session of the dead is one of pgbouncer's, under no name of ours. It goes on with the statement, but
    pgbouncer ends it before the commit."""
    bouncer.start()
    rows = open_ledger(bouncer)
    bouncer.server.execute(SLOW_CLAIM, dsn=bouncer.direct)
    with Fleet(bouncer.dsn, "--no-listen", app="ticking:app") as fleet:
        fleet.until("worker.ready")
        (worker,) = fleet.family()

        async def hold() -> None:
            connection = await asyncpg.connect(bouncer.direct)
            async with connection.transaction():
                await connection.execute("SELECT pg_advisory_xact_lock(7)")
                await asyncio.to_thread(put, bouncer.direct, *(Once(number) for number in range(20)))
                await asyncio.to_thread(rows.until, "SELECT count(*) > 0 FROM pg_locks WHERE NOT granted")
                worker.kill()
                await asyncio.to_thread(fleet.until, "worker.ready")
                await connection.execute("SELECT pg_sleep(1.5)")
            await connection.close()

        run(hold())
        rows.until("SELECT count(*) = 0 FROM pg_task", timeout=20)
        fleet.send(signal.SIGTERM)
        assert fleet.ends() == 0, fleet.output
    assert not re.search(r"leases\.released .*tasks=[1-9]", fleet.output)


def kill_one(fleet: Fleet) -> None:
    """Kill a worker; returns when its leases are released and another is ready, in whatever order."""
    fleet.family()[0].kill()
    missing = {"leases.released", "worker.ready"}
    while missing:
        line = fleet.until("")
        missing = {text for text in missing if text not in line}


def assert_one_line(text: str) -> str:
    assert text.count("\n") == 1, text
    assert "Traceback" not in text
    return text


async def open_client(bouncer: Bouncer) -> None:
    async with Client(bouncer.dsn):
        pass
