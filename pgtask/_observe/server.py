"""The HTTP server of the exporter: /metrics, /livez and /readyz.

It listens before the workers start, so that a port that is in use ends the program at once, and an exporter that is
replaced goes on with the same socket. The library does the format of the metrics, and the standard library does HTTP.
"""

from __future__ import annotations

import errno
import importlib.util
import json
import os
import socket
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, ClassVar, NamedTuple

from pgtask.errors import ConfigError

__all__ = ["Answer", "MetricsServer", "check_library", "listen"]

BACKLOG = 64
IDLE = 15.0  # seconds after which a connection that asks for nothing is closed


class Answer(NamedTuple):
    """The answer to a request."""

    status: int
    body: bytes
    content_type: str = "application/json"

    @classmethod
    def of_checks(cls, failures: dict[str, str]) -> Answer:
        """Return the answer of a probe: what has failed, and why."""
        status = "unavailable" if failures else "ok"
        return cls(503 if failures else 200, json.dumps({"status": status, "failed": failures}).encode() + b"\n")


Route = Callable[[str], Answer]
"""Answers a request, given what the client accepts."""


def check_library() -> None:
    """Raise `ConfigError` if the library for the metrics is missing."""
    if importlib.util.find_spec("prometheus_client") is None:
        raise ConfigError("--metrics needs the library prometheus_client: pip install 'pgtask-supervisor[metrics]'")


def listen(address: tuple[str, int], option: str = "--metrics") -> socket.socket:
    """Return a socket that listens at host and port; without a host at all addresses. Raises `ConfigError`, which names
    the `option`."""
    host, port = address
    try:
        found = _bind(host, port)
        # Else the body of an answer waits up to 40 ms for the client to confirm its head. Connections inherit it.
        found.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return found
    except OSError as error:
        hints = {
            errno.EADDRINUSE: "it is in use: give another port, or end the program that has it",
            errno.EACCES: "this user may not open it: give a port above 1023",
            errno.EADDRNOTAVAIL: "this host has no such address",
        }
        what = hints.get(error.errno or 0) or error.strerror or str(error)
        where = f"{f'[{host}]' if ':' in host else host}:{port}" if host else f"port {port}"
        raise ConfigError(f"{option}: cannot listen at {where}: {what}") from None


def _bind(host: str, port: int) -> socket.socket:
    if not host and socket.has_dualstack_ipv6():
        return socket.create_server(("", port), family=socket.AF_INET6, dualstack_ipv6=True, backlog=BACKLOG)
    family = socket.getaddrinfo(host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0][0]
    return socket.create_server((host, port), family=family, backlog=BACKLOG)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server_version = "pgtask"
    sys_version = ""
    timeout = IDLE
    routes: ClassVar[dict[str, Route]]

    def do_GET(self) -> None:
        route = self.routes.get(self.path.partition("?")[0])
        if route is None:
            answer = Answer(404, b"there are " + " ".join(self.routes).encode() + b"\n", "text/plain; charset=utf-8")
        else:
            answer = route(self.headers.get("Accept", ""))
        self.send_response(answer.status)
        self.send_header("Content-Type", answer.content_type)
        self.send_header("Content-Length", str(len(answer.body)))
        self.send_header("Cache-Control", "no-store")
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(answer.body)

    do_HEAD = do_GET  # noqa: N815

    def log_message(self, *_: Any) -> None:
        """Log no request."""


class MetricsServer(ThreadingHTTPServer):
    """Serves `routes` over a socket that listens already, each request in a thread."""

    daemon_threads = True

    def __init__(self, listening: socket.socket, routes: dict[str, Route]) -> None:
        handler = type("Handler", (_Handler,), {"routes": routes})
        super().__init__(listening.getsockname()[:2], handler, bind_and_activate=False)
        self.socket.close()
        self.socket = listening
        os.set_blocking(listening.fileno(), True)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Drop a connection that the client has broken."""
