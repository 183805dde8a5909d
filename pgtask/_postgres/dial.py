"""Dialling: the connection to the first host of a DSN that is usable.

The hosts are started one after the other, `STAGGER` apart or as soon as one fails, and each has a time of its own. The
first that is usable wins, and the others are dropped. The host that was usable the last time comes first.

Invariant: every connection has TCP keepalives, so that a line whose host is gone ends by itself.
"""

from __future__ import annotations

import asyncio
import random
import socket
from collections import deque
from collections.abc import Mapping
from contextlib import suppress
from typing import Any
from weakref import WeakKeyDictionary

import asyncpg

from pgtask._dsn_parameters import Dialling, Host, read_dialling
from pgtask.errors import DatabaseRefused

__all__ = ["CONNECT_TIMEOUT", "NoUsableHost", "dial", "keep_alive", "open_descriptors"]

CONNECT_TIMEOUT = 15.0  # seconds for a host
STAGGER = 0.25  # seconds between the starts of two hosts
# While a host does not answer, the others are asked again so often (seconds), since a standby may be promoted
# meanwhile; and for so long `prefer-standby` waits for one.
AGAIN = 1.0

# A line to a host that has lost its place is dead sooner, if it is: after about 3 s.
_IMPATIENT = {"TCP_KEEPIDLE": 1, "TCP_KEEPALIVE": 1, "TCP_KEEPINTVL": 1, "TCP_KEEPCNT": 2, "TCP_USER_TIMEOUT": 2_500}

_connections: WeakKeyDictionary[Any, tuple[tuple[Host, ...], Host | None]] = WeakKeyDictionary()
"""The connections that pgtask has opened in this process: the hosts of each, and which of them it is."""

_last_good: dict[tuple[tuple[Host, ...], str], Host] = {}
"""By hosts and `target_session_attrs`: the host that was usable the last time."""


class NoUsableHost(Exception):
    """No host of several is usable. `causes` are the errors by host, or texts that say why it cannot be used."""

    def __init__(self, causes: list[tuple[Host, Exception | str]]) -> None:
        super().__init__(causes)
        self.causes = causes


async def dial(dsn: str, *, reads: bool = False, **options: Any) -> Any:
    """Open an asyncpg connection with these options of `asyncpg.connect`, for a DSN that has passed `check_dsn`.

    Of several hosts it takes the first that may write (`target_session_attrs=read-write`), or if it only `reads`, a
    primary rather than a standby, unless the DSN says otherwise. Raises the errors of asyncpg and of the socket,
    `NoUsableHost`, and `DatabaseRefused` for a parameter that cannot be honoured. Cancelling it drops what was opened.
    """
    try:
        dialling = read_dialling(dsn)
    except ValueError as error:
        raise DatabaseRefused(f"the DSN cannot be used: {error}") from None
    if not dialling.hosts:
        session = dialling.session or "any"
        connection, misfit = await _open(dialling, None, session, options)
        if misfit is not None and not session.startswith("prefer-"):
            connection.terminate()
            raise ConnectionError(misfit)
        return connection
    session = dialling.session or ("prefer-primary" if reads else "read-write")
    return await _Race(dialling, session, options).run()


class _Race:
    """The dialling of several hosts, one connection of which is taken."""

    def __init__(self, dialling: Dialling, session: str, options: Mapping[str, Any]) -> None:
        self._dialling, self._session, self._options = dialling, session, options
        self._key = dialling.hosts, session
        self._under_way: dict[asyncio.Task[tuple[Any, str | None]], Host] = {}
        self._causes: dict[Host, Exception | str] = {}
        self._spare: tuple[Host, Any] | None = None  # not of the kind that is preferred

    async def run(self) -> Any:
        waiting = deque(self._order())
        first: set[asyncio.Task[Any]] = set()  # the first dialling of each host
        try:
            while waiting or self._under_way:
                if waiting:
                    task = self._start(waiting.popleft())
                    if len(first) < len(self._dialling.hosts):
                        first.add(task)
                done, _ = await asyncio.wait(
                    self._under_way, timeout=STAGGER if waiting else AGAIN, return_when=asyncio.FIRST_COMPLETED
                )
                for task in done:
                    if (found := self._take(task)) is not None:
                        return self._win(*found)
                if not done and not waiting:
                    if self._spare is not None:
                        break
                    if first & self._under_way.keys():
                        waiting.extend(self._worth_another_try())
            if self._spare is not None:
                spare, self._spare = self._spare, None
                return self._win(*spare)
            raise NoUsableHost(list(self._causes.items()))
        finally:
            await self._drop_others()

    def _start(self, host: Host) -> asyncio.Task[tuple[Any, str | None]]:
        task = asyncio.create_task(_open(self._dialling, host, self._session, self._options))
        self._under_way[task] = host
        return task

    def _worth_another_try(self) -> list[Host]:
        """Return the hosts that were not usable, and may be now."""
        passing = (str, OSError, asyncpg.CannotConnectNowError)
        busy = self._under_way.values()
        return [host for host, cause in self._causes.items() if host not in busy and isinstance(cause, passing)]

    def _order(self) -> list[Host]:
        """Return the hosts, that which was usable the last time first."""
        hosts = list(self._dialling.hosts)
        if self._dialling.is_balanced:
            random.shuffle(hosts)
        elif (last := _last_good.get(self._key)) is not None:
            hosts.remove(last)
            hosts.insert(0, last)
        return hosts

    def _take(self, task: asyncio.Task[tuple[Any, str | None]]) -> tuple[Host, Any] | None:
        """Return the connection of a dialling that has ended, if it is usable."""
        host = self._under_way.pop(task)
        error = task.exception()
        if error is not None:
            if not isinstance(error, Exception):
                raise error
            self._causes[host] = error
            return None
        connection, misfit = task.result()
        if misfit is None:
            return host, connection
        if self._session.startswith("prefer-") and self._spare is None:
            self._spare = host, connection
        else:
            connection.terminate()
            self._causes[host] = misfit
        return None

    def _win(self, host: Host, connection: Any) -> Any:
        """Note that a host is usable, and return its connection."""
        before = _last_good.get(self._key)
        _last_good[self._key] = host
        if self._session in ("read-write", "primary") and before not in (None, host) and not self._dialling.is_balanced:
            _doubt(self._dialling.hosts, host)
        return connection

    async def _drop_others(self) -> None:
        for task in self._under_way:
            task.cancel()
        opened = await asyncio.gather(*self._under_way, return_exceptions=True)
        if self._spare is not None:
            self._spare[1].terminate()
        for one in opened:
            if isinstance(one, tuple):
                one[0].terminate()


async def _open(
    dialling: Dialling, host: Host | None, session: str, options: Mapping[str, Any]
) -> tuple[Any, str | None]:
    """Connect to a host, or as the DSN says. Return the connection, and why it is not usable, if it is not."""
    place = {} if host is None else {"host": host.name, "port": host.port}
    patience = dialling.connect_timeout or CONNECT_TIMEOUT
    try:
        async with asyncio.timeout(patience):
            connection = await asyncpg.connect(
                dialling.dsn, timeout=None, target_session_attrs="any", **place, **options
            )
            try:
                keep_alive(connection, dialling.keepalive)
                misfit = await _find_misfit(connection, session)
            except BaseException:
                connection.terminate()
                raise
    except TimeoutError as error:
        raise error if str(error) else TimeoutError(f"no answer in {patience:g} s") from error
    _connections[connection] = dialling.hosts, host
    return connection, misfit


async def _find_misfit(connection: Any, session: str) -> str | None:
    """Return why a session is not as `target_session_attrs` asks, or None if it is. The server says it as it lets us
    in; a pooler may not, and is asked."""
    if session == "any":
        return None
    settings = connection.get_settings()
    standby = getattr(settings, "in_hot_standby", None)
    read_only = getattr(settings, "default_transaction_read_only", None)
    if standby is None or read_only is None:
        async with connection.transaction():
            row = await connection.fetchrow(
                "SELECT pg_is_in_recovery(), current_setting('default_transaction_read_only')"
            )
        standby, read_only = "on" if row[0] else "off", row[1]
    kind = "a standby" if standby == "on" else "read-only" if read_only == "on" else "a primary"
    fits = {
        "read-write": kind == "a primary",
        "read-only": kind != "a primary",
        "primary": standby == "off",
        "standby": standby == "on",
        "prefer-standby": standby == "on",
        "prefer-primary": standby == "off",
    }[session]
    return None if fits else f"it is {kind}, and target_session_attrs is {session}"


# --- the lines


def keep_alive(connection: Any, keepalive: Mapping[str, int]) -> None:
    """Set these options of the socket, which asyncpg does not offer. A socket of Unix needs none."""
    line = connection._transport.get_extra_info("socket")
    if line is None or line.family == getattr(socket, "AF_UNIX", None):
        return
    line.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option, value in keepalive.items():
        if hasattr(socket, option):
            line.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), value)


def _doubt(hosts: tuple[Host, ...], primary: Host) -> None:
    """Another host is the primary: find out soon which lines to the others are dead. One that is not stays as it is."""
    for connection in _open_connections():
        among, host = _connections.get(connection, ((), None))
        if among == hosts and host != primary:
            with suppress(OSError):  # it is closed meanwhile, as the thread that renews leases may do
                keep_alive(connection, _IMPATIENT)


def open_descriptors() -> list[int]:
    """Return the descriptors of all connections that pgtask has opened in this process, for a forked copy of it."""
    lines = [one._transport.get_extra_info("socket") for one in _open_connections()]
    return [line.fileno() for line in lines if line is not None]


def _open_connections() -> list[Any]:
    """Return the connections that are open, in whatever thread."""
    found = [reference() for reference in _connections.keyrefs()]
    return [one for one in found if one is not None and not one.is_closed()]
