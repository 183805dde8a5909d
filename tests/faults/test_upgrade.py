"""A rolling upgrade: the code of now and that of the schema before it work side by side, on a table migrated by ours.

A ledger in the database notes each outcome, with the session that wrote it. Chains of steps and runs go on until the
test lets them end, and other tasks come all the time: nothing may be lost, and no outcome may take effect twice.
"""

from __future__ import annotations

import asyncio
import contextlib
import signal
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import ticking
from fix_database import execute, run
from fix_earlier import Earlier
from fleet import Fleet, Rows
from paths import PYTHONPATH

from pgtask import Client
from pgtask._postgres.migrate import SCHEMA_VERSION, migrate

pytestmark = [pytest.mark.faults, pytest.mark.timeout(400)]

LEDGER = """
ALTER TABLE ledger ADD COLUMN writer text DEFAULT current_setting('application_name');
ALTER TABLE ledger ADD COLUMN number bigserial;
"""
TRIGGER = """
import asyncio, sys
from pgtask import Client
from ticking import Once, Tick, ticking

async def main():
    dsn, go, count = sys.argv[1], sys.argv[2], int(sys.argv[3])
    async with Client(dsn) as client:
        await client.enqueue_many([Tick(go)] * count + [Once(-number - 1) for number in range(500)])
        print(*[(await client.trigger(ticking, go)).id for _ in range(count)])

asyncio.run(main())
"""
CHAINS = 6


class Upgrade:
    """The database of an upgrade, the work that goes on in it, and what must hold of that in the end."""

    def __init__(self, dsn: str, directory: Path, earlier: Earlier) -> None:
        self.dsn, self.rows, self.earlier = dsn, Rows(dsn), earlier
        self.go = directory / "go"
        self.runs: list[str] = []
        self._fed = 0
        self._over = threading.Event()
        self._feeder = threading.Thread(target=self._feed)

    def begin(self) -> None:
        """Start the work, by the client of before: chains, runs and single tasks."""
        asyncio.run(execute(self.dsn, ticking.LEDGER + LEDGER))
        words = ("-c", TRIGGER, self.dsn, str(self.go), str(CHAINS))
        self.runs += self.earlier.run(*words).split()

    def begin_more(self) -> None:
        """Start as many runs and chains by the client of now."""

        async def main() -> None:
            async with Client(self.dsn, app=ticking.app) as client:
                await client.enqueue_many([ticking.Tick(str(self.go))] * CHAINS)
                for _ in range(CHAINS):
                    self.runs.append(str((await client.trigger(ticking.ticking, str(self.go))).id))

        run(main())

    @contextlib.contextmanager
    def feeding(self) -> Iterator[None]:
        """Insert single tasks until all work ends."""
        self._feeder.start()
        try:
            yield
        finally:
            self._end_feed()

    def _feed(self) -> None:
        """By SQL, as a producer of any version may."""
        insert = "INSERT INTO pg_task (step) SELECT format($1, n) FROM generate_series($2::int, $3::int) AS n"
        while not self._over.wait(0.02):
            self.rows(insert, '{"Ticking":{"Once":{"number":%s}}}', self._fed, self._fed + 99)
            self._fed += 100

    def _end_feed(self) -> None:
        self._over.set()
        self._feeder.join(30)

    def goes_on(self, *fleets: Fleet) -> None:
        """Wait until a worker of each fleet has written outcomes of chains and of single tasks, and runs have recorded,
        all of it from now on."""
        last = self.rows.value("SELECT coalesce(max(number), 0) FROM ledger")
        records = "SELECT count(*) FROM pg_task_checkpoints"
        recorded = self.rows.value(records)
        for fleet in fleets:
            sessions = [f"pgtask worker {process.pid} %" for process in fleet.family()]
            for kind in ("Once", "Tick"):
                query = "SELECT count(*) > 5 FROM ledger WHERE number > $1 AND writer LIKE ANY ($2) AND step ~ $3"
                self.rows.until(query, last, sessions, f'"{kind}"', timeout=60)
        self.rows.until(records, holds=lambda count: count > recorded + len(self.runs), timeout=60)

    def replaces_killed(self, fleet: Fleet) -> None:
        """Kill a worker; its leases are released, and another follows."""
        fleet.family()[0].kill()
        missing = {"leases.released", "worker.ready"}
        while missing:
            line = fleet.until("")
            missing = {text for text in missing if text not in line}

    def ends(self, fleet: Fleet) -> None:
        """Let all work end in this fleet, the last one."""
        self._end_feed()
        self.go.touch()
        self.rows.until("SELECT count(*) = 0 FROM pg_task", timeout=100)
        stop(fleet)

    def check(self) -> None:
        """Each outcome was written once, and nothing is lost."""
        assert self.rows("SELECT task, step FROM ledger GROUP BY task, step HAVING count(*) > 1") == []
        chains = self.rows(
            "SELECT count(*), max((step::json->'Ticking'->'Tick'->>'number')::integer) FROM ledger"
            " WHERE step ~ '\"Tick\"' GROUP BY task"
        )
        assert len(chains) == len(self.runs)
        assert all(outcomes == last + 1 for outcomes, last in chains), "a step was passed over"
        assert self.rows.value("SELECT count(*) FROM ledger WHERE step ~ '\"Once\"'") == self._fed + 500
        runs = self.rows("SELECT id::text, state, output::text FROM pg_task_runs")
        steps = dict(self.rows("SELECT run::text, count(*) FROM pg_task_checkpoints GROUP BY run"))
        assert {row["id"]: row["state"] for row in runs} == dict.fromkeys(self.runs, "SUCCESS")
        assert {row["id"]: int(row["output"]) for row in runs} == steps
        assert self.rows.value("SELECT count(*) = count(DISTINCT (run, name)) FROM pg_task_checkpoints")


def stop(fleet: Fleet) -> None:
    fleet.send(signal.SIGTERM)
    assert fleet.ends() == 0, fleet.output
    assert "Traceback" not in fleet.output
    assert "lease.lost" not in fleet.output


def fleet_of(dsn: str, path: str) -> Fleet:
    return Fleet(dsn, app="ticking:app", procs=2, path=path)


def test_table_is_migrated_under_workers_of_before(empty_dsn: str, tmp_path: Path, earlier: Earlier) -> None:
    """The old workers work on, also those that start afterwards; then the new ones take over."""
    earlier.run("-m", "pgtask", "migrate", "--dsn", empty_dsn)
    upgrade = Upgrade(empty_dsn, tmp_path, earlier)
    upgrade.begin()
    with fleet_of(empty_dsn, earlier.path) as old, fleet_of(empty_dsn, PYTHONPATH) as new, upgrade.feeding():
        assert new.ends() == 5, "the table is too old for it"
        old.until("worker.ready", times=2)
        upgrade.goes_on(old)
        asyncio.run(migrate(empty_dsn))
        upgrade.goes_on(old)
        with fleet_of(empty_dsn, PYTHONPATH) as new:
            new.until("worker.ready", times=2)
            upgrade.begin_more()
            upgrade.goes_on(old, new)
            upgrade.replaces_killed(old)
            upgrade.replaces_killed(new)
            upgrade.goes_on(old, new)
            stop(old)
            upgrade.goes_on(new)
            upgrade.ends(new)
    upgrade.check()


def test_workers_of_before_start_beside_those_of_now(empty_dsn: str, tmp_path: Path, earlier: Earlier) -> None:
    """The other way round: the deploy is rolled back, and the old workers finish the work."""
    asyncio.run(migrate(empty_dsn))
    upgrade = Upgrade(empty_dsn, tmp_path, earlier)
    upgrade.begin()
    with fleet_of(empty_dsn, PYTHONPATH) as new, upgrade.feeding():
        new.until("worker.ready", times=2)
        upgrade.begin_more()
        upgrade.goes_on(new)
        with fleet_of(empty_dsn, earlier.path) as old:
            old.until("worker.ready", times=2)
            upgrade.goes_on(old, new)
            upgrade.replaces_killed(new)
            upgrade.replaces_killed(old)
            upgrade.goes_on(old, new)
            stop(new)
            upgrade.goes_on(old)
            upgrade.ends(old)
    upgrade.check()


def test_code_too_old_for_the_table_is_refused_by_name(empty_dsn: str, earlier: Earlier) -> None:
    """As after a migration that changes what the earlier code uses."""
    asyncio.run(migrate(empty_dsn))
    Rows(empty_dsn)("UPDATE pg_task_schema SET needs_code = $1 WHERE version = $1", SCHEMA_VERSION)
    with fleet_of(empty_dsn, earlier.path) as old:
        assert old.ends() == 5
    says = f"the schema of pg_task is at version {SCHEMA_VERSION}, this pgtask knows only {earlier.version}"
    assert old.output.count(f"pgtask-supervisor: {says}; run: pip install --upgrade pgtask") == 1
    assert "Traceback" not in old.output
