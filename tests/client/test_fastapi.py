"""The lifespan for FastAPI: one client for the life of the app, beside a lifespan of the user's own."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from typing import Any

import pytest
from fix_database import run
from greeter import ReadName

pytest.importorskip("fastapi")

import httpx
from fastapi import FastAPI, Request

import pgtask
from pgtask.errors import DatabaseRefused, PgtaskError
from pgtask.fastapi import Pgtask, lifespan


async def call(server: FastAPI, path: str, **state: Any) -> httpx.Response:
    """Serve one request, with the state that a server would pass from the lifespan."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await server({**scope, "state": dict(state)}, receive, send)

    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://here") as http:
        return await http.get(path)


def make_server(**options: Any) -> FastAPI:
    server = FastAPI(lifespan=lifespan(**options))

    @server.get("/add")
    async def add(client: Pgtask) -> str:
        return str(await client.enqueue(ReadName("a")))

    @server.get("/state")
    async def state(request: Request) -> list[str]:
        return [type(request.state.pgtask).__name__, request.state.mine]

    return server


def test_client_is_a_parameter_and_closed_at_the_end(dsn: str) -> None:
    async def main() -> None:
        server = make_server(dsn=dsn)
        async with server.router.lifespan_context(server) as state:
            answer = await call(server, "/add", **(state or {}))
            assert answer.status_code == 200, answer.text
            client = server.state.pgtask
            assert isinstance(client, pgtask.Client)
        with pytest.raises(PgtaskError):
            await client.enqueue(ReadName("b"))

    run(main())


def test_own_lifespan_is_entered_with_the_client_open(dsn: str) -> None:
    order: list[str] = []

    @asynccontextmanager
    async def own(server: FastAPI) -> AsyncIterator[Mapping[str, Any]]:
        order.append(str(await server.state.pgtask.enqueue(ReadName("first"))))
        yield {"mine": "yes"}
        order.append(str(await server.state.pgtask.enqueue(ReadName("last"))))

    async def main() -> None:
        server = make_server(dsn=dsn, inner=own)
        async with server.router.lifespan_context(server) as state:
            assert (await call(server, "/state", **(state or {}))).json() == ["Client", "yes"]
        assert len(order) == 2

    run(main())


def test_app_without_the_lifespan_says_what_to_do(dsn: str) -> None:
    async def main() -> None:
        server = FastAPI()

        @server.get("/add")
        async def add(client: Pgtask) -> str:
            return "never"

        with pytest.raises(PgtaskError, match="lifespan"):
            await call(server, "/add")

    run(main())


def test_app_with_a_wrong_database_does_not_start(dsn: str) -> None:
    async def main() -> None:
        server = make_server(dsn=dsn.replace("/pgtask_test", "/no_such"))
        with pytest.raises(DatabaseRefused):
            async with server.router.lifespan_context(server):
                pass

    run(main())
