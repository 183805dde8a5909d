"""The Django project of the tests, here and in supervisors, on the database of the test."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any
from urllib.parse import urlsplit

import pytest


@pytest.fixture
def site(dsn: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The module of its tasks."""
    django = pytest.importorskip("django")
    if django.VERSION < (6, 0):
        pytest.importorskip("django_tasks")
    monkeypatch.setenv("DJANGO_SETTINGS_MODULE", "django_site.settings")
    monkeypatch.setenv("SITE_DSN", dsn)
    django.setup()
    from django.db import connections

    connections.close_all()
    connections["default"].settings_dict["NAME"] = urlsplit(dsn).path.lstrip("/")
    from django_site import tasks

    yield tasks
    connections.close_all()
