"""The Django app: with it in INSTALLED_APPS, `manage.py migrate` makes and upgrades the tables of pgtask too."""

from __future__ import annotations

import asyncio
import sys
from typing import Any

import django
from django.apps import AppConfig, apps
from django.core import checks
from django.db.models.signals import post_migrate

from pgtask._postgres.migrate import migrate
from pgtask.django.project import dsn_of, pgtask_databases

__all__ = ["PgtaskConfig"]


class PgtaskConfig(AppConfig):  # type: ignore[misc,unused-ignore]
    """Has the tables follow the version of pgtask that is installed; there are no migration files to keep in step."""

    name = "pgtask.django"
    label = "pgtask"
    verbose_name = "pgtask"

    def ready(self) -> None:
        """Connect to the end of `migrate`, and so to the making of a test database; check the settings."""
        post_migrate.connect(_migrate_tables, sender=self)
        if django.VERSION < (6, 0) and not apps.is_installed("django_tasks"):  # else that app checks all backends
            checks.register(_check_backends)


def _check_backends(**_: Any) -> list[checks.CheckMessage]:
    from django_tasks import task_backends

    from pgtask.django.backend import PgtaskBackend

    ours = [backend for backend in task_backends.all() if isinstance(backend, PgtaskBackend)]
    return [error for backend in ours for error in backend.check()]


def _migrate_tables(using: str, verbosity: int, **_: Any) -> None:
    if using in pgtask_databases():
        for line in asyncio.run(migrate(dsn_of(using))):
            if verbosity:
                sys.stdout.write(f"  pgtask: {line}\n")
