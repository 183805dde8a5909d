"""The doors to connections of psycopg in its pipeline mode."""

from __future__ import annotations

import psycopg
import pytest
from client_kit import numbered
from fix_database import run
from post import Write, doubled

from pgtask import Client, EnqueueError, SyncClient
from pgtask.errors import DatabaseRefused, DataRefused

pytestmark = pytest.mark.one_database


@pytest.mark.parametrize("autocommit", [False, True])
def test_a_sync_pipeline(dsn: str, autocommit: bool) -> None:
    client = SyncClient()
    with psycopg.connect(dsn, autocommit=autocommit) as conn:
        with conn.pipeline(), conn.transaction():
            conn.execute("SELECT 1")
            first = client.enqueue(Write("x"), key="k", conn=conn)
            assert client.enqueue(Write("x"), key="k", conn=conn) == first
            client.trigger_many(doubled, [1, 2], conn=conn)
            client.enqueue_many(numbered(2500), key=repr, conn=conn)
            with pytest.raises(DatabaseRefused, match="COPY cannot be used in pipeline mode"):
                client.enqueue_many(numbered(3), conn=conn)
        assert conn.execute("SELECT count(*) FROM pg_task").fetchone() == (2503,)


@pytest.mark.parametrize("autocommit", [False, True])
def test_an_async_pipeline(dsn: str, autocommit: bool) -> None:
    async def main() -> None:
        client = Client()
        async with await psycopg.AsyncConnection.connect(dsn, autocommit=autocommit) as conn:
            async with conn.pipeline(), conn.transaction():
                await conn.execute("SELECT 1")
                first = await client.enqueue(Write("x"), key="k", conn=conn)
                assert await client.enqueue(Write("x"), key="k", conn=conn) == first
                await client.trigger_many(doubled, [1, 2], conn=conn)
            assert await (await conn.execute("SELECT count(*) FROM pg_task")).fetchone() == (3,)

    run(main())


def test_a_pipeline_outside_of_a_transaction_is_refused(dsn: str) -> None:
    with psycopg.connect(dsn, autocommit=True) as conn, conn.pipeline():
        conn.execute("SELECT 1")
        with pytest.raises(EnqueueError, match="its autocommit is on: begin one before"):
            SyncClient().enqueue(Write("x"), conn=conn)


def test_a_refusal_in_a_pipeline(dsn: str) -> None:
    with psycopg.connect(dsn) as conn:
        with conn.pipeline():
            conn.execute("ALTER TABLE pg_task ADD CONSTRAINT small CHECK (octet_length(step) < 100)")
            with pytest.raises(DataRefused, match="small"):
                SyncClient().enqueue(Write("x" * 100), conn=conn)
        conn.rollback()
