"""The three showpieces at a small size: what they say, what they leave in the database, and that their checks check."""

from __future__ import annotations

import ast
import asyncio
import contextlib
import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import asyncpg
import psutil
import pytest
from fix_database import run
from fleet import SHORT_LEASE, Fleet, Rows
from paths import REPOSITORY

import pgtask
from examples import crawl, demonstration, embed, load


@pytest.fixture(autouse=True)
def here(tmp_path: Path) -> Path:
    """The working directory, with the examples in it."""
    (tmp_path / "examples").symlink_to(REPOSITORY / "examples")
    return tmp_path


def said_by(name: str, *words: str, dsn: str | None = None, code: int = 0) -> str:
    """Run a showpiece to this exit code, and return its output; that on stderr if it fails."""
    environment = {**os.environ, **({"DATABASE_URL": dsn} if dsn else {})}
    command = [sys.executable, "-W", "error", "-m", f"examples.{name}", *words]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=110, check=False)
    assert done.returncode == code, done.stdout + done.stderr
    assert "Traceback" not in done.stderr, done.stderr
    return done.stderr if code else done.stdout


# --- load

CSV = """\
cup,1,2.50,10
cup,3,3.50,5
cup,2,9.00,1
cup,3,3.50,5
pot,1,20,1

pot,one,20,1
,1,2.50,1
pot,1,20,1,more
"""


def test_load_keeps_the_latest_price_and_adds_each_line(dsn: str, here: Path) -> None:
    rows = Rows(dsn)
    (here / "some.csv").write_text(CSV)
    for _ in range(2):  # a run starts from nothing
        said = said_by("load", "--file", "some.csv", dsn=dsn)
        assert said.endswith("checked against the file: 2 rows are the same, 0 differ\n")
        stock = rows("SELECT product, version, price::text, lines, quantity FROM load_stock ORDER BY product")
        assert [tuple(row) for row in stock] == [("cup", 3, "3.50", 4, 21), ("pot", 1, "20", 1, 1)]
        assert [tuple(row) for row in rows("SELECT line, reason FROM load_rejects ORDER BY line")] == [
            (6, "1 fields in place of 4"),
            (7, "a field is no number"),
            (8, "no product"),
            (9, "5 fields in place of 4"),
        ]
    assert rows.value("SELECT count(*) FROM pg_task") == 0


@pytest.mark.timeout(180)
def test_load_takes_effect_once_under_kills(dsn: str) -> None:
    rows = Rows(dsn)
    said = said_by("load", "--lines", "2000", "--kills", "3", dsn=dsn)
    assert re.search("^killed a worker [1-3] times$", said, re.MULTILINE), said
    assert re.search(r": \d+ rows are the same, 0 differ\n$", said), said
    assert rows.value("SELECT sum(lines) + (SELECT count(*) FROM load_rejects) FROM load_stock") == 2000
    assert rows.value("SELECT count(*) FROM pg_task") == 0


@pytest.mark.parametrize(
    "damage",
    [
        "UPDATE load_stock SET quantity = quantity + 1 WHERE product = 'cup'",
        "UPDATE load_stock SET price = 2.50 WHERE product = 'cup'",
        "DELETE FROM load_stock WHERE product = 'pot'",
        "INSERT INTO load_stock VALUES ('pan', 1, 1, 1, 1)",
        "INSERT INTO load_rejects SELECT * FROM load_rejects LIMIT 1",
    ],
)
def test_check_of_load_finds_a_difference(
    damage: str, dsn: str, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (here / "some.csv").write_text(CSV)

    async def check() -> list[int]:
        connection = await asyncpg.connect(dsn)
        await connection.execute(load.TABLES)
        for number, text in enumerate(load.lines_of(here / "some.csv"), 1):
            try:
                await connection.execute(load.UPSERT, *([field] for field in load.parsed(text)))
            except ValueError as error:
                await connection.execute("INSERT INTO load_rejects VALUES ($1, $2, $3)", number, text, str(error))
        before = await load.check(here / "some.csv", connection)
        await connection.execute(damage)
        after = await load.check(here / "some.csv", connection)
        await connection.close()
        return [before, after]

    assert run(check()) == [0, 1]
    assert "DIFFERENT" in capsys.readouterr().out


# --- crawl


@pytest.mark.timeout(180)
@pytest.mark.parametrize("kills", [0, 2])
def test_crawl_stores_each_page_exactly_once(kills: int, dsn: str) -> None:
    rows = Rows(dsn)
    said = said_by("crawl", "--hosts", "8", "--pages", "8", "--kills", str(kills), dsn=dsn)
    assert said.endswith("checked against the links: 64 pages were stored exactly once, 0 differ\n")
    busy = re.search(r"; ([\d,]+) times the server was busy", said)
    assert busy, said
    assert int(busy[1]) > 0
    assert rows.value("SELECT count(*) = 64 AND count(DISTINCT url) = 64 FROM crawl_page")
    assert rows.value("SELECT count(*) FROM pg_task") == 0


@pytest.mark.parametrize("stored", [{"a": 2, "b": 1}, {"a": 1}, {"a": 1, "b": 1, "c": 1}])
def test_check_of_crawl_finds_a_difference(stored: dict[str, int], capsys: pytest.CaptureFixture[str]) -> None:
    assert crawl.check({"a", "b"}, Counter({"a": 1, "b": 1})) == 0
    assert crawl.check({"a", "b"}, Counter(stored)) == 1
    assert "DIFFERENT" in capsys.readouterr().out


# --- embed


@pytest.mark.timeout(180)
@pytest.mark.parametrize("kills", [0, 1])
def test_embed_parks_the_bad_texts_alone(kills: int, dsn: str) -> None:
    rows = Rows(dsn)
    said = said_by("embed", "--texts", "600", "--kills", str(kills), dsn=dsn)
    assert "checked: 598 texts are embedded exactly once, 2 bad ones are parked\n" in said
    assert "0 were over a limit; parked: 2\n" in said
    waited = re.search(r" in the mean; (\d+) had to wait", said)
    assert waited, said
    assert int(waited[1]) > 0
    assert rows.value("SELECT count(*) = 598 AND count(DISTINCT id) = 598 FROM embed_vector")
    (tried,) = {row["tried"] for row in rows("SELECT tried FROM pg_task")}
    assert tried == 1, "neither the waits nor the calls with others have used a try"
    assert all("Permanent: a text has a symbol" in row["error"] for row in rows("SELECT error FROM pg_task"))


def test_check_of_embed_finds_a_difference(capsys: pytest.CaptureFixture[str]) -> None:
    documents = embed.made(100)
    right: list[dict[str, Any]] = [
        {"id": one.id, "model": one.model, "vector": embed.vector_of(one.model, one.text)}
        for one in documents
        if one.id != 77
    ]
    assert embed.check(documents, right, {77: "bad"}) == 0
    for rows, parked in (
        (right[1:], {77: "bad"}),
        ([*right, right[0]], {77: "bad"}),
        ([{**right[0], "vector": [0.5]}, *right[1:]], {77: "bad"}),
        (right, {}),
        (right, {77: "bad", 1: "poisoned"}),
    ):
        assert embed.check(documents, rows, parked) == 1
    assert capsys.readouterr().out.count("DIFFERENT") == 5


# --- a kill just before an outcome is written

HOLD = """
    CREATE FUNCTION hold() RETURNS trigger LANGUAGE plpgsql
    AS $$ BEGIN PERFORM pg_advisory_xact_lock_shared(13); RETURN OLD; END $$;
    CREATE TRIGGER hold BEFORE DELETE ON pg_task FOR EACH ROW EXECUTE FUNCTION hold();
    SELECT pg_advisory_lock(13);
"""
HELD = "SELECT array_agg(pid) FROM pg_locks WHERE locktype = 'advisory' AND NOT granted"


async def sees_before_the_outcome(name: str, dsn: str, connection: Any, what: str) -> Any:
    """Run the tasks, kill the workers while they write the first outcomes, and let others run the tasks to their end.

    Returns the value of the query `what`, asked just before the kill.
    """
    await connection.execute(HOLD)
    with Fleet(dsn, "--burst", *SHORT_LEASE, app=f"examples.{name}:app", procs=2) as fleet:
        async with asyncio.timeout(60):
            while not await connection.fetchval(HELD):  # noqa: ASYNC110  the server cannot tell us
                await asyncio.sleep(0.01)
        seen = await connection.fetchval(what)
        for worker in fleet.family():
            with contextlib.suppress(psutil.NoSuchProcess):
                worker.kill()
        await connection.execute(f"SELECT pg_terminate_backend(pid) FROM unnest(({HELD})) AS pid")
        await connection.execute("SELECT pg_advisory_unlock(13)")
        await asyncio.to_thread(fleet.ends)
    return seen


@pytest.mark.timeout(180)
def test_load_writes_nothing_before_its_outcomes(dsn: str, here: Path) -> None:
    (here / "some.csv").write_text(CSV)

    async def kill() -> tuple[Any, int]:
        async with pgtask.Client(dsn) as client:
            connection = await asyncpg.connect(dsn)
            await load.enqueue(client, connection, here / "some.csv")
            what = "SELECT (SELECT count(*) FROM load_stock) + (SELECT count(*) FROM load_rejects)"
            seen = await sees_before_the_outcome("load", dsn, connection, what)
            code = await load.check(here / "some.csv", connection)
            await connection.close()
        return seen, code

    assert run(kill(), 150) == (0, 0)


@pytest.mark.timeout(180)
def test_crawl_notes_no_page_before_its_outcome(dsn: str, monkeypatch: pytest.MonkeyPatch) -> None:
    hosts, start = crawl.Hosts(2, 3), "http://host-0.example/0"

    async def kill() -> tuple[Any, int]:
        async with pgtask.Client(dsn) as client, demonstration.serving(hosts.answer) as port:
            monkeypatch.setenv("CRAWL_PORT", str(port))
            connection = await asyncpg.connect(dsn)
            await crawl.enqueue(client, connection, start)
            seen = await sees_before_the_outcome("crawl", dsn, connection, "SELECT count(*) FROM crawl_known")
            stored = Counter(row["url"] for row in await connection.fetch("SELECT url FROM crawl_page"))
            await connection.close()
        return seen, crawl.check(hosts.reachable(start), stored)

    assert run(kill(), 150) == (1, 0), "the first page is noted"


@pytest.mark.timeout(180)
def test_embed_stores_nothing_before_its_outcomes(dsn: str, monkeypatch: pytest.MonkeyPatch) -> None:
    documents = embed.made(20)

    async def kill() -> tuple[Any, int]:
        async with pgtask.Client(dsn) as client, demonstration.serving(embed.Provider().answer) as port:
            monkeypatch.setenv("EMBED_PORT", str(port))
            connection = await asyncpg.connect(dsn)
            await embed.enqueue(client, connection, documents)
            seen = await sees_before_the_outcome("embed", dsn, connection, "SELECT count(*) FROM embed_vector")
            rows = await connection.fetch("SELECT id, model, vector FROM embed_vector")
            await connection.close()
        return seen, embed.check(documents, rows, {})

    assert run(kill(), 150) == (0, 0)


# --- all of them


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (("load", "--lines", "many"), "'many' is no whole number"),
        (("load", "--kills=-1"), "'-1' is no whole number"),
        (("load", "--file", "nowhere.csv"), "nowhere.csv cannot be read"),
        (("crawl", "--hosts", "0"), "a crawl takes at least one host with one page"),
        (("embed", "more"), "unrecognized arguments: more"),
    ],
)
def test_showpiece_refuses_what_it_cannot_use(words: tuple[str, ...], reason: str) -> None:
    assert reason in said_by(*words, code=2)


def test_showpiece_without_a_database_says_so_in_a_line() -> None:
    said = said_by("load", dsn="postgresql://localhost/x?sslmode=nonsense", code=5)
    assert said.count("\n") == 1, said


@pytest.mark.parametrize("name", ["load", "crawl", "embed"])
def test_showpiece_takes_nothing_to_do(name: str, dsn: str) -> None:
    words = {"load": ("--lines", "0"), "crawl": ("--hosts", "1", "--pages", "1"), "embed": ("--texts", "0")}[name]
    assert "DIFFERENT" not in said_by(name, *words, dsn=dsn)


@pytest.mark.parametrize("path", sorted((REPOSITORY / "examples").rglob("*.py")), ids=lambda path: path.stem)
def test_examples_use_public_names_only(path: Path) -> None:
    for part in ast.walk(ast.parse(path.read_text())):
        if isinstance(part, ast.Import):
            assert not any(name.name.startswith("pgtask.") for name in part.names), path
        if isinstance(part, ast.ImportFrom) and (part.module or "").partition(".")[0] == "pgtask":
            public = ("pgtask", "pgtask.django", "pgtask.errors", "pgtask.fastapi", "pgtask.testing")
            assert part.module in public, part.module
            if part.module == "pgtask":
                assert {name.name for name in part.names} <= set(pgtask.__all__), path
