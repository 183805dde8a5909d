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


def test_the_sql_of_the_page_does_what_it_says(dsn: str) -> None:
    rows = Rows(dsn)
    (block,) = re.findall(r"^```sql\n(.*?)^```$", PAGE.read_text(), re.DOTALL | re.MULTILINE)
    cancel, enqueue, revive, other, expire = (part for part in re.sub(r"--.*", "", block).split(";") if part.strip())
    (first,) = rows(enqueue)
    rows(cancel)
    (second,) = rows(enqueue)
    assert first != second
    assert rows.value("SELECT count(*) FROM pg_task") == 1
    rows("UPDATE pg_task SET error = 'wrong', tried = 5")
    rows(cancel)  # of a parked one, nothing
    rows(revive)
    found = rows("SELECT id, error, tried FROM pg_task")
    assert [tuple(row) for row in found] == [(second[0], None, 0)]
    rows(other)
    rows(expire)
    assert rows.value("SELECT count(*) FROM pg_task WHERE expires_at > now() + interval '59 min'") == 1
