"""What each request passes: the check of its Host, and the headers that bind the browser.

Invariant: no answer goes out without the policy, under which a page runs no script and loads no file but ours.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any
from urllib.parse import urlsplit

__all__ = ["LOOPBACK", "Guard", "host_of"]

LOOPBACK = frozenset(("127.0.0.1", "::1", "localhost"))

POLICY = (
    "default-src 'none'; style-src 'self'; script-src 'self'; img-src 'self'; connect-src 'self'; "
    "form-action 'self'; base-uri 'none'; frame-ancestors 'none'"
)
HEADERS = {
    "content-security-policy": POLICY,
    "x-content-type-options": "nosniff",
    "referrer-policy": "same-origin",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "cache-control": "no-store",
}
_HEADERS = [(name.encode(), value.encode()) for name, value in HEADERS.items()]


def host_of(header: str) -> str | None:
    """Return the host that a Host header names, without its port; None for a header that cannot be read."""
    try:
        return urlsplit(f"//{header}").hostname
    except ValueError:
        return None


class Guard:
    """An ASGI app around another one. `hosts`: the names under which it answers, None for any. Bound to loopback, it
    answers under the names of loopback only: a foreign page whose name leads to 127.0.0.1 gets nothing."""

    def __init__(self, app: Any, hosts: Collection[str] | None) -> None:
        self._app = app
        self._hosts = hosts

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        async def send_guarded(event: Any) -> None:
            if event["type"] == "http.response.start":
                event = {**event, "headers": [*event.get("headers", ()), *_HEADERS]}
            await send(event)

        if scope["type"] == "http" and not self._admits(scope["headers"]):
            text = b"this console answers under the names of loopback only, as http://127.0.0.1:PORT\n"
            plain = [(b"content-type", b"text/plain; charset=utf-8"), (b"content-length", b"%d" % len(text))]
            await send_guarded({"type": "http.response.start", "status": 421, "headers": plain})
            await send_guarded({"type": "http.response.body", "body": text})
            return
        await self._app(scope, receive, send_guarded)

    def _admits(self, headers: list[tuple[bytes, bytes]]) -> bool:
        if self._hosts is None:
            return True
        named = [value.decode("latin-1") for name, value in headers if name == b"host"]
        return len(named) == 1 and host_of(named[0]) in self._hosts
