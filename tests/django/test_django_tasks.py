"""Django's tasks over the backend: enqueue in a transaction, the calls in a worker, and what a result says."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import uuid4

import pytest
from fleet import Rows, burst, working

pytestmark = pytest.mark.filterwarnings("ignore:.*psycopg2.*:DeprecationWarning")

APP = "pgtask.django:app"


@contextmanager
def locked(dsn: str, table: str) -> Iterator[None]:
    """Lock a table, so that those who write to it wait."""
    import psycopg

    with psycopg.connect(dsn) as connection:
        connection.execute(f"LOCK TABLE {table}")
        yield
        connection.rollback()


def work(dsn: str, *arguments: str, code: int = 0) -> Any:
    """Run all that is due, in a supervisor of its own."""
    return burst(dsn, *arguments, app=APP, code=code)


def statuses(*results: Any) -> list[str]:
    for result in results:
        result.refresh()
    return [str(result.status) for result in results]


def test_functions_plain_and_async_return_their_values(site: Any, dsn: str) -> None:
    before = datetime.now(UTC)
    results = [site.add.enqueue(1, two=2), site.aadd.enqueue(3, two=4), site.told.enqueue()]
    assert statuses(*results) == ["READY"] * 3
    assert [result.attempts for result in results] == [0, 0, 0]
    work(dsn)
    assert statuses(*results) == ["SUCCESSFUL"] * 3
    assert results[0].return_value == 3
    assert results[1].return_value == 7
    assert results[2].return_value == [1, results[2].id, "RUNNING", 0, True]
    for result in results:
        assert result.attempts == len(result.worker_ids) == 1
        assert before - timedelta(seconds=5) < result.enqueued_at <= result.started_at <= result.finished_at
        assert result.last_attempted_at == result.started_at
        assert result.errors == []
    assert Rows(dsn).value("SELECT count(*) FROM pg_task") == 0


def test_enqueue_is_part_of_the_transaction(site: Any, dsn: str) -> None:
    from django.db import transaction

    rows = Rows(dsn)
    count = "SELECT count(*) FROM pg_task"

    with transaction.atomic():
        lost = site.add.enqueue(1)
        assert str(site.add.get_result(lost.id).status) == "READY"
        assert rows.value(count) == 0
        transaction.set_rollback(True)
    with transaction.atomic():
        with transaction.atomic():
            site.add.enqueue(2)
            transaction.set_rollback(True)  # to its savepoint
        kept = site.add.enqueue(3)
    assert rows.value(count) == 1
    assert site.add.get_result(kept.id).args == [3]
    from pgtask.django.contract import TaskResultDoesNotExist

    with pytest.raises(TaskResultDoesNotExist):
        site.add.get_result(lost.id)


@pytest.mark.parametrize("name", ["boom", "aboom"])
def test_failure_is_parked_and_counts_each_attempt(name: str, site: Any, dsn: str) -> None:
    rows = Rows(dsn)
    result = getattr(site, name).enqueue("no such order")
    for attempt in (1, 2):
        work(dsn, code=1)
        assert statuses(result) == ["FAILED"]
        assert result.attempts == attempt
        assert [error.exception_class for error in result.errors] == [ValueError] * attempt
        assert "no such order" in result.errors[-1].traceback
        assert "tasks.py" in result.errors[-1].traceback
        assert result.started_at <= result.last_attempted_at <= result.finished_at
        assert rows.value("SELECT error FROM pg_task").startswith("ValueError: no such order")
        assert rows.value("SELECT tried FROM pg_task") == 1
        with pytest.raises(ValueError, match="failed"):
            _ = result.return_value
        rows("UPDATE pg_task SET error = NULL, tried = 0")
        assert statuses(result) == ["READY"]
        assert result.attempts == attempt


def test_value_that_json_lacks_is_a_failure(site: Any, dsn: str) -> None:
    result = site.unfit.enqueue()
    work(dsn, code=1)
    assert statuses(result) == ["FAILED"]
    assert result.errors[0].exception_class is TypeError


def test_value_that_no_row_holds_parks_the_task(site: Any, dsn: str) -> None:
    result = site.long.enqueue(1_000_000)
    work(dsn, code=1)
    assert statuses(result) == ["FAILED"]
    error = Rows(dsn).value("SELECT error FROM pg_task")
    assert "DjangoTask.django_site.tasks.long ends with 1000" in error
    assert "bytes, more than the 524288 allowed" in error


def test_throttled_is_no_failure(site: Any, dsn: str) -> None:
    result = site.throttled_once.enqueue(1)
    work(dsn)
    assert statuses(result) == ["SUCCESSFUL"]
    assert result.attempts == 1


def test_queue_priority_and_time_are_those_of_the_row(site: Any, dsn: str) -> None:
    rows = Rows(dsn)
    later = datetime.now(UTC) + timedelta(days=1)
    result = site.note.using(run_after=later).enqueue("x")
    (row,) = rows("SELECT queue, priority, wakeup_at FROM pg_task")
    assert tuple(row) == ("mail", 7, later)
    assert result.task.run_after == later
    found = site.note.get_result(result.id)
    assert (found.task.queue_name, found.task.priority, found.task.run_after) == ("mail", 7, later)
    work(dsn)
    assert statuses(found) == ["READY"]


def test_running_is_seen_while_a_worker_has_the_lease(site: Any, dsn: str) -> None:
    result = site.add.enqueue(1)
    lease = "UPDATE pg_task SET locked_by = gen_random_uuid(), lock_expires_at = now() + make_interval(secs => $1)"
    Rows(dsn)(lease, 60.0)
    assert statuses(result) == ["RUNNING"]
    assert result.attempts == 1
    assert result.started_at is None, "no worker has made this lease"
    Rows(dsn)(lease, -60.0)
    assert statuses(result) == ["READY"]


def test_start_of_a_first_attempt_is_known_while_it_runs(site: Any, dsn: str) -> None:
    rows = Rows(dsn)
    rows("CREATE TABLE noted (text text)")
    with working(dsn, app=APP), locked(dsn, "noted"):  # the stop waits for the step
        result = site.note.enqueue("x")
        rows.until("SELECT count(*) FROM pg_task WHERE locked_by IS NOT NULL")
        assert statuses(result) == ["RUNNING"]
        assert result.started_at == result.last_attempted_at
        assert result.enqueued_at - timedelta(seconds=1) < result.started_at <= datetime.now(UTC)


def test_function_may_change_its_arguments(site: Any, dsn: str) -> None:
    result = site.emptied.enqueue([1, 2], {"a": 1})
    work(dsn)
    assert statuses(result) == ["SUCCESSFUL"]
    assert result.return_value == [[], {}]
    assert site.emptied.get_result(result.id).args == [[1, 2], {"a": 1}]


def test_async_door_enqueues_and_reads(site: Any, dsn: str) -> None:
    async def enqueue() -> Any:
        result = await site.aadd.aenqueue(1, two=1)
        await result.arefresh()
        return result

    result = asyncio.run(enqueue())
    work(dsn)

    async def read() -> Any:
        return await site.aadd.aget_result(result.id)

    assert asyncio.run(read()).return_value == 2


def test_without_results_a_finished_task_leaves_nothing(site: Any, dsn: str) -> None:
    from pgtask.django.contract import TaskResultDoesNotExist

    result = site.forget.enqueue()
    work(dsn)
    assert Rows(dsn).value("SELECT count(*) FROM pg_task_archive") == 0
    with pytest.raises(TaskResultDoesNotExist):
        result.refresh()


def test_result_of_another_task_does_not_exist(site: Any, dsn: str) -> None:
    from pgtask.django.contract import TaskResultDoesNotExist

    rows = Rows(dsn)
    foreign = rows.value(
        """INSERT INTO pg_task (id, step) VALUES (gen_random_uuid(), '{"A":{"B":null}}') RETURNING id"""
    )
    for id in (str(foreign), str(uuid4()), "nothing", ""):
        with pytest.raises(TaskResultDoesNotExist):
            site.add.get_result(id)


def test_connections_are_closed_between_calls(site: Any, dsn: str) -> None:
    rows = Rows(dsn)
    rows("CREATE TABLE noted (text text)")
    results = [site.backends_seen.enqueue(number) for number in range(20)]
    site.note.enqueue("plain")
    site.anote.enqueue("async")
    work(dsn)
    assert statuses(*results) == ["SUCCESSFUL"] * 20
    assert not any(result.return_value[1] for result in results), "a connection was left open"
    assert len({result.return_value[2] for result in results}) == 20
    assert sorted(row[0] for row in rows("SELECT text FROM noted")) == ["async", "plain"]
    others = "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND pid <> pg_backend_pid()"
    rows.until(others, holds=lambda count: count <= 1)  # that of this process


@pytest.mark.parametrize("name", ["note", "anote"])
def test_idle_worker_has_no_connection_of_django(name: str, site: Any, dsn: str) -> None:
    from django.db import connections

    rows = Rows(dsn)
    rows("CREATE TABLE noted (text text)")
    with working(dsn, app=APP) as fleet:
        getattr(site, name).enqueue("x")
        connections.close_all()
        rows.until("SELECT count(*) FROM pg_task_archive")
        of_django = (
            "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND pid <> pg_backend_pid() "
            "AND backend_type = 'client backend' AND application_name !~ '^pgtask'"
        )
        rows.until(of_django, holds=lambda count: count == 0, timeout=10)
    assert "ResourceWarning" not in fleet.output, "the end of its thread has closed it"


def test_supervisor_runs_the_project_by_its_settings_alone(site: Any, dsn: str) -> None:
    results = [site.add.enqueue(number) for number in range(50)]
    with_no_dsn = burst_by_settings(dsn)
    assert statuses(*results) == ["SUCCESSFUL"] * 50
    assert "DATABASES['default']" in with_no_dsn
    assert dsn.partition("://")[2].partition("@")[0] not in ("", with_no_dsn)


def burst_by_settings(dsn: str) -> str:
    """Run a burst without an app and a database on the command line, and return its output."""
    import os
    import subprocess
    import sys

    from paths import PYTHONPATH

    command = [sys.executable, "-W", "error", "-m", "pgtask._cli.supervisor", "--burst", "--procs", "1"]
    environment = {**os.environ, "PYTHONPATH": PYTHONPATH}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr
