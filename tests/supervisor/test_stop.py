"""`pgtask stop` and the notification of pg_task: the workers that obey, and the roles that may stop them."""

from __future__ import annotations

import asyncio
import os
import re
from collections.abc import Iterator

import apps
import asyncpg
import pytest
from fleet import Fleet, Rows, put, working

from pgtask._cli.main import main
from pgtask._postgres.migrate import migrate
from pgtask._supervisor.states import ExitCode

PLAIN = "SELECT pg_notify('pg_task_changed', 'stop_worker')"
LISTENS = (
    "SELECT count(*) = 1 FROM pg_stat_activity WHERE datname = current_database() AND application_name ~ 'listen$'"
)
LOOKED = f"{LISTENS} AND query ~ 'pg_task_stops|virtualtransaction' AND query_start > $1"
"""After a time: it looks for orders before it says that it sleeps."""


@pytest.fixture
def role(rows: Rows) -> Iterator[str]:
    """Yield a role that may log in and read `pg_task`."""
    name = f"reader_{os.getpid()}"
    rows(f"CREATE ROLE {name} LOGIN")
    rows(f"GRANT SELECT ON pg_task TO {name}")
    yield name
    rows(f"DROP OWNED BY {name}")
    rows(f"DROP ROLE {name}")


def as_role(dsn: str, role: str) -> str:
    return re.sub(r"//[^@/]*@", f"//{role}@", dsn)


def in_schema(dsn: str, schema: str) -> str:
    """Create and migrate a schema, and return a DSN for it."""

    async def make() -> None:
        connection = await asyncpg.connect(dsn)
        await connection.execute(f'CREATE SCHEMA "{schema}"')
        await connection.close()
        await migrate(found)

    found = f'{dsn}&search_path="{schema.replace(" ", "%20")}"'
    asyncio.run(make())
    return found


def works(fleet: Fleet, dsn: str) -> None:
    """Wait until a task is done, which shows that the fleet has not stopped."""
    put(dsn, apps.Noop())
    Rows(dsn).until("SELECT count(*) = 0 FROM pg_task")
    assert fleet.process.poll() is None


def test_stop_reaches_fleet_of_one_schema(dsn: str, capsys: pytest.CaptureFixture[str]) -> None:
    other = in_schema(dsn, "Two words")
    with working(dsn) as stays, Fleet(other, procs=2) as goes:
        goes.until("worker.ready", times=2)
        assert main(["stop", "--dsn", other]) == 0
        assert "of the schema Two words, but none of pg_task in Rust" in capsys.readouterr().out
        assert goes.ends() == 0
        assert "supervisor.stopping cause=stop_worker" in "".join(goes.lines)
        works(stays, dsn)


def test_stop_does_not_claim_that_schema_has_workers(dsn: str, capsys: pytest.CaptureFixture[str]) -> None:
    other = in_schema(dsn, "other")
    with working(dsn) as stays:
        Rows(dsn).until(LISTENS)
        assert main(["stop", "--dsn", other]) == 0
        assert "; 1 listen on this database, those of other schemas included" in capsys.readouterr().out
        works(stays, dsn)


def test_stop_warns_of_workers_that_do_not_listen(dsn: str, capsys: pytest.CaptureFixture[str]) -> None:
    with working(dsn, "--no-listen") as fleet:
        assert main(["stop", "--dsn", dsn]) == 0
        assert "workers with --no-listen do not receive this: end their supervisors" in capsys.readouterr().out
        works(fleet, dsn)


def test_stop_in_schema_without_table_is_refused(dsn: str, capsys: pytest.CaptureFixture[str]) -> None:
    Rows(dsn)("CREATE SCHEMA empty")
    with working(dsn) as fleet:
        assert main(["stop", "--dsn", f"{dsn}&search_path=empty"]) != 0
        assert "no schema of the search_path has a table pg_task, but others have" in capsys.readouterr().err
        works(fleet, dsn)


def test_fleet_that_ignores_notification_obeys_stop_command(dsn: str, rows: Rows) -> None:
    with working(dsn, "--ignore-stop-notify") as fleet:
        rows(PLAIN)
        works(fleet, dsn)
        assert main(["stop", "--dsn", dsn]) == 0
        assert fleet.ends() == 0
    assert [row["given_by"] for row in rows("SELECT given_by FROM pg_task_stops")] == [
        rows.value("SELECT session_user")
    ]


def test_read_only_role_may_not_stop(dsn: str, rows: Rows, role: str, capsys: pytest.CaptureFixture[str]) -> None:
    with working(dsn, "--ignore-stop-notify") as fleet:
        assert main(["stop", "--dsn", as_role(dsn, role)]) == ExitCode.DATABASE
        assert f"the role {role} may not stop workers, since it lacks UPDATE on pg_task" in capsys.readouterr().err
        Rows(as_role(dsn, role))(PLAIN)
        with pytest.raises(asyncpg.InsufficientPrivilegeError):
            Rows(as_role(dsn, role))("INSERT INTO pg_task_stops DEFAULT VALUES")
        works(fleet, dsn)
        rows(f"GRANT UPDATE (error, tried) ON pg_task TO {role}")
        assert main(["stop", "--dsn", as_role(dsn, role)]) == 0
        assert fleet.ends() == 0


def test_stop_is_obeyed_after_listen_line_recovers(dsn: str, rows: Rows) -> None:
    """The line was down, or a proxy swallows notifications."""
    with working(dsn) as fleet:
        rows.until(LISTENS)
        rows("INSERT INTO pg_task_stops DEFAULT VALUES")
        works(fleet, dsn)
        rows("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name ~ 'listen$'")
        assert fleet.ends() == 0


def test_stop_reaches_only_workers_that_were_running(dsn: str, rows: Rows) -> None:
    rows("INSERT INTO pg_task_stops DEFAULT VALUES")
    with working(dsn) as fleet:
        rows.until(LISTENS)
        rows("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name ~ 'listen$'")
        rows.until(LISTENS)
        works(fleet, dsn)


def test_notification_stops_fleet_of_older_schema(dsn: str, rows: Rows) -> None:
    with working(dsn) as fleet:
        rows("DROP FUNCTION pg_task_stop")
        assert main(["stop", "--dsn", dsn]) == 0
        assert fleet.ends() == 0


@pytest.mark.parametrize("loss", ["DELETE FROM pg_task_stops", "TRUNCATE pg_task_stops", "DROP TABLE pg_task_stops"])
def test_deleted_stop_rows_stop_no_worker(dsn: str, rows: Rows, loss: str) -> None:
    rows("INSERT INTO pg_task_stops DEFAULT VALUES")
    with working(dsn) as fleet:
        rows.until(LISTENS)
        rows(loss)
        now = rows.value("SELECT clock_timestamp()")
        rows("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name ~ 'listen$'")
        rows.until(LOOKED, now)
        works(fleet, dsn)
        asyncio.run(migrate(dsn))  # the table that it makes counts from 1 again
        # The workers then check the table, which has no row for them.
        now = rows.value("SELECT clock_timestamp()")
        rows("SELECT pg_notify('pg_task_changed', 'stop_worker nobody')")
        rows.until(LOOKED, now)
        works(fleet, dsn)
        assert main(["stop", "--dsn", dsn]) == 0
        assert fleet.ends() == 0


def test_workers_start_without_table_of_stops(dsn: str, rows: Rows) -> None:
    rows("DROP TABLE pg_task_stops")
    with working(dsn, "--ignore-stop-notify") as fleet:
        rows.until(LISTENS)
        works(fleet, dsn)
        assert 'schema.damaged missing="table pg_task_stops"' in "".join(fleet.lines)
        asyncio.run(migrate(dsn))
        assert main(["stop", "--dsn", dsn]) == 0
        assert fleet.ends() == 0


def test_worker_without_select_on_stops_keeps_working(dsn: str, rows: Rows, role: str) -> None:
    rows(f"GRANT ALL ON ALL TABLES IN SCHEMA public TO {role}")
    with working(as_role(dsn, role), "--ignore-stop-notify") as fleet:
        rows.until(LISTENS)
        rows(f"REVOKE SELECT ON pg_task_stops FROM PUBLIC, {role}")
        assert main(["stop", "--dsn", dsn]) == 0
        fleet.until("stop.unreadable")
        works(fleet, dsn)
        rows(f"GRANT SELECT ON pg_task_stops TO {role}")
        rows("SELECT pg_notify('pg_task_changed', 'stop_worker public')")
        assert fleet.ends() == 0
