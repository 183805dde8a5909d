"""A client in the lifespan or in a step of a worker uses the database of the worker's supervisor."""

from __future__ import annotations

import asyncio
from pathlib import Path

import asyncpg
import pytest
from fleet import Fleet, working

from pgtask.config import client_config, load_config, use_config

NOWHERE = "postgresql://127.0.0.1:1/nowhere"


def noted(dsn: str, query: str = "SELECT text FROM noted") -> list[str]:
    async def ask() -> list[str]:
        db = await asyncpg.connect(dsn)
        try:
            return [row[0] for row in await db.fetch(query)]
        finally:
            await db.close()

    return sorted(asyncio.run(ask()))


@pytest.mark.parametrize("environment", [None, NOWHERE])
@pytest.mark.parametrize("flags", [(), ("--no-listen",), ("--preload",)], ids=str)
def test_client_in_worker_enqueues_to_its_database(
    cluster: str,
    template: str,
    dsn: str,
    environment: str | None,
    flags: tuple[str, ...],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Independent of the environment; without it a client elsewhere would start an embedded server."""
    if environment is not None:
        monkeypatch.setenv("PGTASK_DSN", environment)
        monkeypatch.setenv("DATABASE_URL", environment)
    noted(dsn, "CREATE TABLE noted (text text)")
    other = dsn.replace("?", "?application_name=other&", 1)
    noted(dsn, f"""INSERT INTO pg_task (step) VALUES ('{{"Relay":{{"Begin":{{"other":"{other}"}}}}}}')""")
    with Fleet(dsn, "--burst", "--burst-horizon", "1", *flags, app="relay:app") as fleet:
        assert fleet.ends() == 0
    listens = "--no-listen" not in flags
    assert noted(dsn) == ["explicit", "fork", f"lifespan {listens}", "step"]
    assert not Path(".pgtask").exists()


def test_client_in_replaced_worker_knows_the_database(dsn: str) -> None:
    with working(dsn, app="relay:app") as fleet:
        fleet.family()[0].kill()
        fleet.until("worker.ready")


def test_client_outside_a_worker_uses_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PGTASK_DSN", "postgresql:///of_the_environment")
    served = load_config({"dsn": "postgresql:///of_the_supervisor", "listen": True})
    for config in (served, None):
        use_config(config)
        assert client_config(None) == (config or load_config())
        assert client_config("postgresql:///explicit") == load_config()
    use_config(None)
