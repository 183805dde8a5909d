"""The process of the console: its routes, its socket, and its end.

It listens before it opens the database, so that a port that is in use ends it at once.
"""

from __future__ import annotations

import asyncio
import logging
import signal
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http import HTTPStatus
from importlib.resources import files
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from pgtask._observe.web import actions, holding, views
from pgtask._observe.web.guard import LOOPBACK, Guard
from pgtask._observe.web.questions import BadQuestion
from pgtask._observe.web.sessions import PATIENCE
from pgtask._observe.web.site import Site
from pgtask.errors import DatabaseError, StatementTimeout

__all__ = ["make_web_app", "serve_site"]

_TYPES = {"css": "text/css; charset=utf-8", "js": "text/javascript; charset=utf-8", "svg": "image/svg+xml"}
_STATIC = {
    file.name: (file.read_bytes(), _TYPES[file.name.rpartition(".")[2]])
    for file in files("pgtask._observe.web").joinpath("static").iterdir()
    if file.name.rpartition(".")[2] in _TYPES
}


async def _static(request: Request) -> Response:
    try:
        body, media_type = _STATIC[request.path_params["name"]]
    except KeyError:
        raise HTTPException(404) from None
    return Response(body, media_type=media_type)


def make_web_app(site: Site, *, is_loopback: bool) -> Guard:
    """Return the ASGI app. Only a site with keys has the pages that act."""
    routes = [
        Route("/", views.now),
        Route("/tasks", views.tasks),
        Route("/tasks/{id}", views.task),
        Route("/runs", views.runs),
        Route("/runs/{id}", views.run),
        Route("/parked", views.parked),
        Route("/machine", views.machine),
        Route("/limits", holding.limits),
        Route("/schedules", holding.schedules),
        Route("/groups", holding.groups),
        Route("/static/{name}", _static),
    ]
    if site.keys is not None:
        routes += [
            Route("/unlock", actions.unlock, methods=["GET", "POST"]),
            Route("/lock", actions.lock, methods=["POST"]),
            Route("/confirm", actions.confirm),
            Route("/act", actions.act, methods=["POST"]),
            Route("/pause", actions.pause_or_resume, methods=["POST"]),
        ]
    handlers: dict[Any, Callable[[Request, Any], Any]] = {
        HTTPException: _answer_http,
        BadQuestion: _answer_bad,
        DatabaseError: _answer_database,
        StatementTimeout: _answer_slow,
    }
    app = Starlette(routes=routes, exception_handlers=handlers)
    app.state.site = site
    return Guard(app, LOOPBACK if is_loopback else None)


async def _answer_http(request: Request, error: HTTPException) -> Response:
    return _answer(request, error.status_code, f"{request.method} {request.url.path}: {error.detail}")


async def _answer_bad(request: Request, error: BadQuestion) -> Response:
    return _answer(request, 400, str(error))


async def _answer_database(request: Request, error: DatabaseError) -> Response:
    return _answer(request, 503, str(error))


async def _answer_slow(request: Request, error: StatementTimeout) -> Response:
    text = f"the database took longer than {PATIENCE:g} s: give a filter that it can check faster, or ask later"
    return _answer(request, 503, text)


def _answer(request: Request, status: int, text: str) -> Response:
    site: Site = request.app.state.site
    return site.render(request, "error.html", status=status, title=HTTPStatus(status).phrase, text=text)


class _Server(uvicorn.Server):
    """A server that ends in order on SIGINT and SIGTERM."""

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        loop = asyncio.get_running_loop()
        for one in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(one, self.handle_exit, one, None)
        yield


async def serve_site(site: Site, listening: socket.socket, *, is_loopback: bool) -> None:
    """Serve the pages until a signal ends it."""
    logging.getLogger("uvicorn.error").setLevel(logging.ERROR)
    config = uvicorn.Config(
        make_web_app(site, is_loopback=is_loopback),
        access_log=False,
        lifespan="off",
        log_config=None,
        server_header=False,
        timeout_graceful_shutdown=2,
        ws="none",
    )
    try:
        await _Server(config).serve(sockets=[listening])
    finally:
        for sessions in (site.reading, site.writing):
            if sessions is not None:
                await sessions.close()
        await site.looks.aclose()
