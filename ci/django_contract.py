"""Run Django's tests of its tasks contract against our backend: its classes as they are, with other settings.

    ci/django-contract [TEST ...]

Each class of Django's tests is subclassed with `TASKS` that name our backend. The tests of the dummy backend look at
`default_task_backend.results`, and the tests of the immediate one at a result that is finished at once: `Recorded` and
`Worked` add this. `Worked` has a real supervisor work off the task, and relays the log of its worker to this process.

`OTHER` lists the tests that are about something else, with the reasons.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import logging
import os
import subprocess
import sys
import tempfile
import unittest
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, urlsplit

import django
from django.conf import settings

OF_THEIRS = "asserts the class of Django's own backend"
KEEPS = "asserts that the backend keeps no results; ours does"
COMMIT = "asserts that nothing waits for the commit; ours does: test_waits_for_the_commit"
OTHER = {
    "TaskTestCase.test_using_correct_backend": OF_THEIRS,
    "TaskTestCase.test_get_backend": OF_THEIRS,
    "DummyBackendTestCase.test_using_correct_backend": OF_THEIRS,
    "DummyBackendTestCase.test_refresh_result": "changes the list of the dummy backend behind its back",
    "DummyBackendTestCase.test_refresh_result_async": "changes the list of the dummy backend behind its back",
    "ImmediateBackendTestCase.test_using_correct_backend": OF_THEIRS,
    "ImmediateBackendTestCase.test_throws_keyboard_interrupt": "is about the process of the caller; ours is a worker",
    "ImmediateBackendTestCase.test_cannot_get_result": KEEPS,
    "ImmediateBackendTestCase.test_cannot_refresh_result": KEEPS,
    "ImmediateBackendTestCase.test_cannot_pass_run_after": "asserts that the backend does not defer; ours does",
    "DummyBackendTransactionTestCase": COMMIT,
    "ImmediateBackendTransactionTestCase": COMMIT,
}


def configure(dsn: str) -> None:
    """Set Django up on a database, here and in the workers, which read the same from CONTRACT_DSN."""
    url = urlsplit(dsn)
    query = dict(parse_qsl(url.query))
    database = {
        "ENGINE": "django.db.backends.postgresql",
        "NAME": url.path.lstrip("/"),
        "USER": url.username or "",
        "HOST": query.get("host", url.hostname or ""),
        "PORT": query.get("port", str(url.port or "")),
        "TEST": {"NAME": url.path.lstrip("/")},
    }
    settings.configure(
        DATABASES={"default": database},
        INSTALLED_APPS=["pgtask.django", "tasks"],
        USE_TZ=True,
        SECRET_KEY="none",
        TASKS={alias: {"BACKEND": "django_contract.Recorded", "QUEUES": []} for alias in ("default", "immediate")},
        LOGGING_CONFIG=None,
    )
    django.setup()


if not settings.configured and "CONTRACT_DSN" in os.environ:
    configure(os.environ["CONTRACT_DSN"])

if settings.configured:
    from pgtask.django import PgtaskBackend

    class Recorded(PgtaskBackend):
        """Our backend, with the list of results that the tests of the dummy backend look at."""

        def clear(self) -> None:
            """Delete all tasks, and what is kept of them."""
            from django.db import connections

            with connections[self.database].cursor() as cursor:
                cursor.execute("DELETE FROM pg_task; DELETE FROM pg_task_archive")

        @property
        def results(self) -> list[Any]:
            """The results of all tasks, the oldest first."""
            from django.db import connections

            with connections[self.database].cursor() as cursor:
                cursor.execute("SELECT id::text FROM pg_task ORDER BY id")
                return [self.get_result(id) for (id,) in cursor.fetchall()]

    class Worked(Recorded):
        """Our backend, with a supervisor that works off each task before `enqueue` returns."""

        def enqueue(self, task: Any, args: Any, kwargs: Any) -> Any:
            """Enqueue a task, have it worked off, and return its result."""
            result = super().enqueue(task, args, kwargs)
            work_off()
            result.refresh()
            return result


class _RelayedLog(logging.Handler):
    """Writes the log of Django's tasks as JSON, for `work_off`."""

    def emit(self, record: logging.LogRecord) -> None:
        line = {"level": record.levelno, "name": record.name, "text": self.format(record)}
        print("relay " + json.dumps(line), flush=True)


def make_worker_app() -> Any:
    """Return the app of the workers."""
    from pgtask.django import make_app

    log = logging.getLogger("django.tasks")
    log.addHandler(_RelayedLog())
    log.setLevel(logging.DEBUG)
    log.propagate = False
    return make_app()


def work_off() -> None:
    """Run a burst, and log here what its worker has logged about Django's tasks."""
    command = [sys.executable, "-m", "pgtask._cli.supervisor", "django_contract:worker", "--burst", "--procs", "1"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode in (0, 1), done.stdout + done.stderr
    for line in (done.stdout + done.stderr).splitlines():
        if line.startswith("relay "):
            told = json.loads(line.removeprefix("relay "))
            logging.getLogger(told["name"]).log(told["level"], "%s", told["text"])


def __getattr__(name: str) -> Any:
    if name == "worker":
        return make_worker_app()
    raise AttributeError(name)


def cases_and_settings() -> list[tuple[Any, dict[str, Any]]]:
    """Return Django's classes, each with its `TASKS`; without them, it has backends of its own."""
    from tasks import (  # type: ignore[import-not-found]
        test_custom_backend,
        test_dummy_backend,
        test_immediate_backend,
        test_tasks,
    )

    recorded = {"BACKEND": "django_contract.Recorded", "QUEUES": []}
    worked = {"BACKEND": "django_contract.Worked", "QUEUES": []}
    missing = {"BACKEND": "does.not.exist"}
    return [
        (
            test_tasks.TaskTestCase,
            {"default": {**recorded, "QUEUES": ["default", "queue_1"]}, "immediate": worked, "missing": missing},
        ),
        (test_dummy_backend.DummyBackendTestCase, {"default": recorded}),
        (test_immediate_backend.ImmediateBackendTestCase, {"default": worked}),
        (test_custom_backend.CustomBackendTestCase, {}),
        (test_custom_backend.CustomTaskTestCase, {}),
    ]


def contract_cases() -> Iterator[type[unittest.TestCase]]:
    """Yield Django's classes with our settings, and one of ours."""
    from django.test import TransactionTestCase, override_settings

    for case, values in cases_and_settings():
        body: dict[str, Any] = {"databases": {"default"}, "available_apps": None, "__module__": __name__}
        for place, reason in OTHER.items():
            name, _, test = place.partition(".")
            if name == case.__name__:
                body[test] = unittest.skip(reason)(lambda self: None)
        made: Any = type(case.__name__, (case, TransactionTestCase), body)
        yield override_settings(TASKS=values)(made) if values else case

    @override_settings(TASKS={"default": {"BACKEND": "django_contract.Recorded", "QUEUES": []}})
    class CommitTestCase(TransactionTestCase):  # type: ignore[misc,unused-ignore]
        """What Django's two tests of this name assert of its own backends, for one whose queue is the database."""

        databases = frozenset({"default"})

        def test_waits_for_the_commit(self) -> None:
            from django.db import transaction
            from django.tasks import default_task_backend
            from tasks import tasks

            default_task_backend.clear()
            with transaction.atomic():
                assert tasks.noop_task.enqueue().enqueued_at is not None
                assert len(default_task_backend.results) == 1
                transaction.set_rollback(True)
            assert default_task_backend.results == []

    yield CommitTestCase


def main(words: list[str]) -> int:
    from pgtask._postgres import embedded

    with tempfile.TemporaryDirectory(prefix="pgtask-django-") as scratch, contextlib.ExitStack() as stack:
        dsn = embedded.start(Path(scratch))
        stack.callback(embedded.stop, Path(scratch))
        os.environ["CONTRACT_DSN"] = os.environ["PGTASK_DSN"] = dsn
        os.environ["DJANGO_ALLOW_ASYNC_UNSAFE"] = "1"  # the async tests call what is not async as well
        return run_tests(words)


def run_tests(words: list[str]) -> int:
    """Run the tests, or those whose names have one of the words; return the exit code."""
    contract = importlib.import_module("django_contract")  # not this module: with the database it configures Django
    from django.core.management import call_command

    call_command("migrate", verbosity=0)
    loader = unittest.defaultTestLoader
    cases: list[Any] = [test for case in contract.contract_cases() for test in loader.loadTestsFromTestCase(case)]
    chosen = [test for test in cases if not words or any(word in test.id() for word in words)]
    result = unittest.TextTestRunner(verbosity=2).run(unittest.TestSuite(chosen))
    failed = len(result.failures) + len(result.errors)
    passed = result.testsRun - failed - len(result.skipped)
    others = f"{len(result.skipped) + 2} are about another backend"
    print(f"django-contract: Django {django.get_version()}: {passed} pass, {failed} fail, {others}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
