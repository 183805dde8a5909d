"""The protocol of systemd for a service of `Type=notify`: it is ready, it makes progress, it stops.

Invariants: without NOTIFY_SOCKET nothing is done; sending never blocks and never fails; no child sends anything, as the
variables are taken out of the environment.
"""

from __future__ import annotations

import contextlib
import math
import os
import socket
from collections.abc import MutableMapping

__all__ = ["SdNotify"]

SHARE = 1 / 3  # of the time that systemd waits for a sign of life, after which the next one is sent


class SdNotify:
    """The service manager that `environ` names, if any."""

    def __init__(self, environ: MutableMapping[str, str] = os.environ) -> None:
        address = environ.pop("NOTIFY_SOCKET", "")
        pid, microseconds = environ.pop("WATCHDOG_PID", ""), environ.pop("WATCHDOG_USEC", "")
        self._address = _parse_address(address)
        is_watched = self._address is not None and microseconds.isdecimal() and pid in ("", str(os.getpid()))
        self._interval = max(0.001, int(microseconds) / 1e6 * SHARE) if is_watched else math.inf
        self._was_ready = self._is_stopping = False
        self.next_at = -math.inf if is_watched else math.inf
        """The time of the next sign of life (monotonic seconds)."""

    @property
    def is_watching(self) -> bool:
        """Return whether it expects signs of life."""
        return self.next_at < math.inf

    def note_ready(self) -> None:
        """Say, once, that the service has started."""
        if not self._was_ready:
            self._was_ready = True
            self._send("READY=1")

    def note_stopping(self) -> None:
        """Say, once, that the service stops."""
        if not self._is_stopping:
            self._is_stopping = True
            self._send("STOPPING=1")

    def advance(self, now: float) -> None:
        """Send a sign of life if it is time."""
        if now >= self.next_at:
            self.next_at = now + self._interval
            self._send("WATCHDOG=1")

    def _send(self, text: str) -> None:
        if self._address is None:
            return
        with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sending:
            sending.setblocking(False)
            sending.sendto(text.encode(), self._address)


def _parse_address(text: str) -> str | None:
    """Return the address of a socket: a path, or an abstract one, which begins with @."""
    if text[:1] not in ("/", "@") or len(text) < 2:
        return None
    return "\0" + text[1:] if text[0] == "@" else text
