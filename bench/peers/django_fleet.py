"""A Django project under the bench: enqueue its tasks, and drain them with N workers, by one backend or the other.

    django_fleet.py BACKEND fill DSN TASKS | drain DSN PROCS

BACKEND is `db`, the worker of django-tasks-db, or `pgtask`. This module is the settings of the project and its tasks as
well; BENCH_BACKEND and BENCH_DSN say which ones.

Settings: those of the guides; `--batch` has the workers of django-tasks-db end when nothing is due. All is enqueued in
one transaction, in both cases by `enqueue`, one at a time, as Django has no other way.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from urllib.parse import parse_qsl, urlsplit

_url = urlsplit(os.environ.get("BENCH_DSN", "postgresql:///none"))
_query = dict(parse_qsl(_url.query))
_BACKENDS = {
    "db": ("django_tasks_db.DatabaseBackend", ["django_tasks", "django_tasks_db"]),
    "pgtask": ("pgtask.django.PgtaskBackend", ["pgtask.django"]),
}
_backend, INSTALLED_APPS = _BACKENDS[os.environ.get("BENCH_BACKEND", "db")]

SECRET_KEY = "none"
USE_TZ = True
DATABASES = {
    "default": {
        "ENGINE": "django.db.backends.postgresql",
        "NAME": _url.path.lstrip("/"),
        "USER": _query.get("user", _url.username or ""),
        "PASSWORD": _query.get("password", _url.password or ""),
        "HOST": _query.get("host", _url.hostname or ""),
        "PORT": _query.get("port", str(_url.port or "")),
        "CONN_MAX_AGE": None,
    }
}
TASKS = {"default": {"BACKEND": _backend}}
LOGGING_CONFIG = None


def fill(tasks: int) -> None:
    import django

    django.setup()
    from django.core.management import call_command
    from django.db import transaction
    from django_noop import noop

    call_command("migrate", verbosity=0)
    with transaction.atomic():
        for number in range(tasks):
            noop.enqueue(number)


def drain(backend: str, procs: int) -> None:
    if backend == "pgtask":
        words = ["pgtask._cli.supervisor", "--burst", "--procs", str(procs), "--log-level", "warning"]
        sys.exit(subprocess.run([sys.executable, "-m", *words], stdout=subprocess.DEVNULL).returncode)
    words = ["django", "db_worker", "--batch", "--interval", "0.1"]
    workers = [subprocess.Popen([sys.executable, "-m", *words]) for _ in range(procs)]
    sys.exit(max(worker.wait() for worker in workers))


def main(backend: str, what: str, dsn: str, number: str) -> None:
    path = os.pathsep.join(filter(None, (str(Path(__file__).parent), os.environ.get("PYTHONPATH"))))
    os.environ.update(BENCH_BACKEND=backend, BENCH_DSN=dsn, DJANGO_SETTINGS_MODULE="django_fleet", PYTHONPATH=path)
    if what == "fill":
        fill(int(number))
    else:
        drain(backend, int(number))


if __name__ == "__main__":
    main(*sys.argv[1:])
