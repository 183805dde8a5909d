"""The Django project as a source of settings: its database, its tables, its signals, and what is refused."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import asyncpg
import pytest
from fix_database import run
from fleet import Rows, burst
from paths import PYTHONPATH

from pgtask._dsn import check_dsn, redact

SECRET = "s3/cr%t@:#?&=wxyz"


def command(*words: str, code: int = 0, **environment: str) -> str:
    """Run a module, and return all that it says."""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-m", *words],
        env={**os.environ, "PYTHONPATH": PYTHONPATH} | environment,
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout + done.stderr


# --- the database


@pytest.mark.parametrize(
    ("entry", "text"),
    [
        ({"NAME": "shop"}, "postgresql:///shop"),
        ({"NAME": "shop", "HOST": "db", "PORT": 5433, "USER": "ada"}, "postgresql://ada@db:5433/shop"),
        ({"NAME": "shop", "HOST": "/run/pg", "PORT": "1"}, "postgresql:///shop?host=/run/pg&port=1"),
        ({"NAME": "shop", "HOST": "::1"}, "postgresql://[::1]/shop"),
        ({"NAME": "a b", "USER": "a@b"}, "postgresql:///a%20b?user=a%40b"),
        ({"NAME": "", "OPTIONS": {"service": "shop"}}, "postgresql:///?service=shop"),
        (
            {"NAME": "shop", "HOST": "db", "OPTIONS": {"sslmode": "require", "pool": True, "assume_role": "app"}},
            "postgresql://db/shop?sslmode=require&role=app",
        ),
    ],
)
def test_database_of_the_settings_is_a_dsn(site: Any, entry: dict[str, Any], text: str) -> None:
    from pgtask.django.project import _dsn_from

    assert check_dsn(_dsn_from(entry)) == text


@pytest.mark.parametrize("user", ["ada", "a@b", ""])
def test_password_arrives_and_is_not_shown(site: Any, user: str) -> None:
    from asyncpg import connect_utils

    from pgtask.django.project import _dsn_from

    dsn = check_dsn(_dsn_from({"NAME": "shop", "HOST": "localhost", "USER": user, "PASSWORD": SECRET}))
    words = {"host", "port", "user", "password", "passfile", "service", "servicefile", "database", "ssl"}
    words |= {"direct_tls", "server_settings", "target_session_attrs", "krbsrvname", "gsslib"}
    _, parameters = connect_utils._parse_connect_dsn_and_args(dsn=dsn, **dict.fromkeys(words))
    assert parameters.password == SECRET
    assert parameters.user == user or not user
    assert "s3" not in redact(dsn)
    assert "wxyz" not in redact(dsn)


def test_supervisor_takes_app_and_database_from_the_settings(site: Any, dsn: str) -> None:
    result = site.add.enqueue(1)
    said = command("pgtask._cli.supervisor", "--burst", "--procs", "1")
    assert "by=DATABASES['default']" in said
    assert "app=pgtask.django:app" in said
    assert site.add.get_result(result.id).return_value == 1
    assert "0" in command("pgtask", "stats")
    # A source of ours wins.
    elsewhere = dsn.replace("/pgtask_test", "/no_such_pgtask_test")
    assert "no_such_pgtask_test" in command("pgtask._cli.supervisor", "--burst", code=5, PGTASK_DSN=elsewhere)


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ("no_such_settings", "no_such_settings"),
        ("broken_settings", "ZeroDivisionError: division by zero (at "),
    ],
)
def test_wrong_settings_are_one_line(settings: str, reason: str, tmp_path: Path) -> None:
    pytest.importorskip("django")
    (tmp_path / "broken_settings.py").write_text("1 / 0\n")
    said = command("pgtask._cli.supervisor", "--burst", code=2, DJANGO_SETTINGS_MODULE=settings)
    assert reason in said
    assert f"DJANGO_SETTINGS_MODULE={settings}: " in said
    assert "Traceback" not in said


def test_project_without_our_backend_names_nothing(tmp_path: Path, dsn: str) -> None:
    pytest.importorskip("django")
    (tmp_path / "other_settings.py").write_text("DATABASES = {}\nSECRET_KEY = 'x'\n")
    said = command("pgtask", "stats", DJANGO_SETTINGS_MODULE="other_settings", DATABASE_URL=dsn)
    assert "Error" not in said
    assert "no app to run" in command("pgtask._cli.supervisor", code=2, DJANGO_SETTINGS_MODULE="other_settings")


def test_management_command_becomes_the_supervisor(site: Any, dsn: str) -> None:
    result = site.add.enqueue(2)
    command("django", "pgtask_supervisor", "--settings", "django_site.settings", "--procs", "1", "--burst")
    assert site.add.get_result(result.id).return_value == 2


def test_migrate_makes_our_tables(site: Any, empty_dsn: str) -> None:
    said = command("django", "migrate", SITE_DSN=empty_dsn)
    assert "pgtask: " in said
    assert Rows(empty_dsn).value("SELECT count(*) FROM pg_task") == 0
    assert "pgtask: " not in command("django", "migrate", SITE_DSN=empty_dsn)


# --- what is refused


def test_missing_table_is_named_with_the_remedy(site: Any, dsn: str) -> None:
    from pgtask.errors import SchemaError

    Rows(dsn)("DROP TABLE pg_task CASCADE")
    with pytest.raises(SchemaError, match="run: pgtask migrate"):
        site.add.enqueue(1)


def test_task_that_no_worker_finds_is_refused(site: Any, dsn: str) -> None:
    from pgtask.django.contract import InvalidTask

    renamed = type(site.add)(func=site.plain)
    with pytest.raises(InvalidTask, match="give it the name of its function"):
        renamed.enqueue()
    assert Rows(dsn).value("SELECT count(*) FROM pg_task") == 0


@pytest.mark.parametrize("value", [float("nan"), "x" * 600_000], ids=["nan", "long"])
def test_arguments_that_no_row_holds_are_refused(site: Any, dsn: str, value: Any) -> None:
    from pgtask.errors import EnqueueError

    with pytest.raises(EnqueueError):
        site.add.enqueue(value)
    assert Rows(dsn).value("SELECT count(*) FROM pg_task") == 0


def test_wrong_options_and_databases_are_named(site: Any) -> None:
    from django.core.exceptions import ImproperlyConfigured

    from pgtask.django import PgtaskBackend

    def told(**settings: Any) -> list[str | None]:
        return [message.id for message in PgtaskBackend("default", settings).check()]

    assert told() == []
    assert told(OPTIONS={"database": "default", "keep_results": False}) == []
    assert told(QUEUES=["a,b"], OPTIONS={"database": "nowhere"}) == ["pgtask.E001", "pgtask.E003"]
    assert told(OPTIONS=["database"]) == ["pgtask.E004"]
    assert told(OPTIONS={"databse": "default"}) == ["pgtask.E005"]
    assert told(OPTIONS={"database": ["default"], "keep_results": "no"}) == ["pgtask.E006", "pgtask.E006"]
    typo = PgtaskBackend("other", {"OPTIONS": {"databse": "default"}})
    (message,) = typo.check()
    assert message.msg == "TASKS['other']['OPTIONS'] has no option 'databse'"
    assert message.hint == "Did you mean database?"
    with pytest.raises(ImproperlyConfigured, match=r"has no option 'databse'\. Did you mean database"):
        typo.get_result("00000000-0000-7000-8000-000000000000")


def test_check_names_the_setting_of_a_wrong_database(tmp_path: Path) -> None:
    """Run the command, on settings whose database cannot be used."""
    pytest.importorskip("django")
    (tmp_path / "wrong_settings.py").write_text(
        """SECRET_KEY = "x"
USE_TZ = True
INSTALLED_APPS = ["pgtask.django"]
DATABASES = {
    "default": {"ENGINE": "django.db.backends.postgresql", "NAME": "x"},
    "files": {"ENGINE": "django.db.backends.sqlite3", "NAME": ":memory:"},
}
BACKEND = "pgtask.django.PgtaskBackend"
TASKS = {
    "one": {"BACKEND": BACKEND, "OPTIONS": {"database": "files"}},
    "two": {"BACKEND": BACKEND, "OPTIONS": {"database": "nowhere"}},
}
"""
    )
    path = os.pathsep.join([str(tmp_path), PYTHONPATH])
    said = command("django", "check", code=1, DJANGO_SETTINGS_MODULE="wrong_settings", PYTHONPATH=path)
    assert "(pgtask.E002) TASKS['one']['OPTIONS']['database'] is 'files', and DATABASES['files'] is sqlite" in said
    assert "(pgtask.E001) TASKS['two']['OPTIONS']['database'] is 'nowhere', and DATABASES has no such entry" in said
    assert "HINT: Name one that is PostgreSQL as TASKS['two']['OPTIONS']['database']: 'default'." in said
    assert "Traceback" not in said


def test_row_cannot_name_what_is_no_task(site: Any, dsn: str) -> None:
    rows = Rows(dsn)
    site.add.enqueue(1)
    rows("UPDATE pg_task SET step = replace(step, 'django_site.tasks.add', 'os.getcwd')")
    burst(dsn, app="pgtask.django:app", code=1)
    assert "os.getcwd is not a task" in rows.value("SELECT error FROM pg_task")


# --- signals


def test_signals_tell_of_each_stage(site: Any, dsn: str) -> None:
    from pgtask.django.contract import signals

    told: list[tuple[str, Any]] = []

    def receive(sender: Any, task_result: Any, **_: Any) -> None:
        told.append((sender.__name__, str(task_result.status)))

    signals.task_enqueued.connect(receive)
    try:
        result = site.heard.enqueue("plain")
    finally:
        signals.task_enqueued.disconnect(receive)
    assert told == [("PgtaskBackend", "READY")]
    site.aheard.enqueue("async")
    Rows(dsn)("CREATE TABLE noted (text text)")
    burst(dsn, app="pgtask.django:app", code=0)
    heard = [row[0] for row in Rows(dsn)("SELECT text FROM noted ORDER BY text")]
    assert heard == ["aheard RUNNING", "aheard SUCCESSFUL", "heard RUNNING", "heard SUCCESSFUL"]
    result.refresh()
    assert result.return_value == "plain"


def test_error_of_a_receiver_changes_nothing(site: Any, dsn: str) -> None:
    result = site.heard.enqueue("plain")  # there is no table for its receivers to write to
    burst(dsn, app="pgtask.django:app")
    result.refresh()
    assert str(result.status) == "SUCCESSFUL"


# --- the row


@pytest.mark.parametrize("name", ["boom", "aboom"])
def test_failure_and_its_parking_are_one_write(name: str, site: Any, dsn: str) -> None:
    """No worker ever finds a call that has failed and may run again."""
    rows = Rows(dsn)
    rows("CREATE TABLE seen (error text, step text)")
    rows(
        """CREATE FUNCTION see() RETURNS trigger LANGUAGE plpgsql AS
        'BEGIN INSERT INTO seen VALUES (NEW.error, NEW.step); RETURN NEW; END'"""
    )
    changed = "AFTER UPDATE ON pg_task FOR EACH ROW WHEN (OLD.step <> NEW.step)"
    rows(f"CREATE TRIGGER see {changed} EXECUTE FUNCTION see()")
    getattr(site, name).enqueue("once")
    burst(dsn, app="pgtask.django:app", code=1)
    ((error, step),) = rows("SELECT error, step FROM seen")
    assert error.startswith("ValueError: once")
    assert '"failures":[{' in step


@pytest.mark.parametrize("step", ["Call", "AsyncCall"])
def test_row_that_names_its_function_by_a_path_runs(step: str, site: Any, dsn: str) -> None:
    """As those of the commit before, whose web processes may still run."""
    path = f"django_site.tasks.{'aadd' if step == 'AsyncCall' else 'add'}"
    rows = Rows(dsn)
    rows("INSERT INTO pg_task (step) VALUES ($1)", f'{{"DjangoTask":{{"{step}":{{"path":"{path}","args":[1,2]}}}}}}')
    burst(dsn, app="pgtask.django:app")
    assert rows.value("SELECT count(*) FROM pg_task") == 0


def test_lists_and_logs_name_the_function(site: Any, dsn: str) -> None:
    site.boom.enqueue("x")
    waiting = site.note.using(queue_name="mail").enqueue("x")
    ended = burst(dsn, "--queue", "default", app="pgtask.django:app", code=1)
    assert "step=DjangoTask.django_site.tasks.boom" in ended.output
    said = command("pgtask", "list", PGTASK_DSN=dsn)
    assert "DjangoTask.django_site.tasks.boom" in said
    assert "DjangoTask.django_site.tasks.note" in said
    assert "DjangoTask.django_site.tasks.note" in command("pgtask", "show", waiting.id, PGTASK_DSN=dsn)


def test_statement_that_reads_a_result_looks_at_two_keys(site: Any, dsn: str) -> None:
    from pgtask._postgres.store import statement

    async def explain() -> str:
        connection = await asyncpg.connect(dsn)
        await connection.execute("SET enable_seqscan = off")
        text = statement("django/result").replace("$1", "'00000000-0000-7000-8000-000000000000'")
        rows = await connection.fetch("EXPLAIN " + text)
        await connection.close()
        return "\n".join(row[0] for row in rows)

    plan = run(explain())
    assert plan.count("Index Scan") == 2, plan
