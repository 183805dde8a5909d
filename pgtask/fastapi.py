"""FastAPI, and all else that knows the lifespan of Starlette: one line opens a client for the life of the app.

    app = FastAPI(lifespan=lifespan())

    @app.post("/documents/{id}")
    async def add(id: int, client: Pgtask) -> str:
        return str(await client.enqueue(Parse(id)))

Invariant: nothing here keeps state of its own: the client is in the state of the app.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Annotated, Any

from fastapi import Depends
from fastapi.requests import HTTPConnection

from pgtask.app import App
from pgtask.client import Client
from pgtask.errors import PgtaskError

__all__ = ["Pgtask", "client_of", "lifespan"]

STATE = "pgtask"

Lifespan = Callable[[Any], AbstractAsyncContextManager[Mapping[str, Any] | None]]


def lifespan(
    dsn: str | None = None, *, app: App | None = None, pool_size: int = 10, inner: Lifespan | None = None
) -> Callable[[Any], AbstractAsyncContextManager[Mapping[str, Any]]]:
    """Return a lifespan that opens a `Client` with these arguments, and closes it at the end.

    The client is `request.state.pgtask`, and `app.state.pgtask` outside of requests; `Pgtask` is it as a parameter.
    `inner` is a lifespan of your own: it is entered when the client is open, and its state is there as well. Opening
    raises what `Client` raises, so an app with a wrong database does not start.
    """

    @asynccontextmanager
    async def opened(server: Any) -> AsyncIterator[Mapping[str, Any]]:
        async with Client(dsn, app=app, pool_size=pool_size) as client:
            setattr(server.state, STATE, client)
            if inner is None:
                yield {STATE: client}
                return
            async with inner(server) as state:
                yield {**(state or {}), STATE: client}

    return opened


def client_of(connection: HTTPConnection) -> Client:
    """Return the client of the app that serves a request or a WebSocket. Raises `PgtaskError` without `lifespan`."""
    client = getattr(connection.state, STATE, None)
    if not isinstance(client, Client):
        raise PgtaskError(
            "this app has no client of pgtask: make it as FastAPI(lifespan=pgtask.fastapi.lifespan()); or its lifespan "
            "was not entered: in a test, write with TestClient(app)"
        )
    return client


Pgtask = Annotated[Client, Depends(client_of)]
"""A parameter of an endpoint: the client of the app."""
