"""The program of the page on enqueueing from anywhere."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

from fleet import Rows
from paths import REPOSITORY

PAGE = REPOSITORY / "docs/enqueue-from-anywhere.md"
SETTINGS = """
import os
from psycopg.conninfo import conninfo_to_dict
where = conninfo_to_dict(os.environ["DATABASE_URL"])
names = {"NAME": "dbname", "USER": "user", "HOST": "host", "PORT": "port"}
DATABASES = {"default": {"ENGINE": "django.db.backends.postgresql", **{a: where.get(b, "") for a, b in names.items()}}}
USE_TZ = True
"""
RUN = """
import asyncio, inspect, os
import django
django.setup()
import anywhere
from pgtask import Client, SyncClient
dsn = os.environ["DATABASE_URL"]
for name, function in vars(anywhere).items():
    if not inspect.isfunction(function) or function.__module__ != "anywhere":
        continue
    is_async = inspect.iscoroutinefunction(function)
    values = {"client": Client() if is_async else SyncClient(), "dsn": dsn}
    found = function(**{name: values[name] for name in inspect.signature(function).parameters})
    if is_async:
        asyncio.run(found)
    print(name)
"""
WITH_AN_ORDER = [
    "by_asyncpg",
    "by_async_psycopg",
    "by_psycopg",
    "by_psycopg2",
    "by_an_async_session",
    "by_a_session",
    "by_django",
]


def test_the_program_of_the_page_enqueues_with_each_driver(dsn: str, tmp_path: Path) -> None:
    rows = Rows(dsn)
    rows("CREATE TABLE shop_order (id serial PRIMARY KEY, product text)")
    program = re.findall(r"^```python\n(.*?)^```$", PAGE.read_text(), re.DOTALL | re.MULTILINE)
    (tmp_path / "anywhere.py").write_text("\n\n".join(program))
    (tmp_path / "shop_settings.py").write_text(SETTINGS)
    environment = {**os.environ, "DATABASE_URL": dsn, "DJANGO_SETTINGS_MODULE": "shop_settings"}
    environment["PYTHONPATH"] = os.pathsep.join([str(REPOSITORY), str(tmp_path)])
    command = [sys.executable, "-W", "error", "-c", RUN]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=100, check=False)
    assert (done.returncode, done.stderr) == (0, ""), done.stderr
    assert done.stdout.split() == [*WITH_AN_ORDER, "without_a_transaction", "in_a_notebook", "by_hand"]
    assert rows.value("SELECT count(*) FROM shop_order") == len(WITH_AN_ORDER)
    steps = [row[0] for row in rows("SELECT (step::json->'Shop'->'Confirm'->>'order')::int FROM pg_task ORDER BY 1")]
    assert steps == [*range(1, len(WITH_AN_ORDER) + 1), 17, 18, 19, 20, 21]
