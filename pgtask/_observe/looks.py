"""Looks at a fleet, one after another, for `pgtask top` and the console: its database, and its supervisors.

Invariant: looks at the same time, or almost, share one sample.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence

from pgtask._observe.fleet_database import FleetDatabase
from pgtask._observe.fleets import FleetsSample, SeenFleet
from pgtask._observe.local_fleets import LocalFleets
from pgtask._observe.remote_fleets import RemoteFleets
from pgtask._observe.top import TopFrame, TopHistory

__all__ = ["FleetLooks"]


class FleetLooks:
    """The supervisors of this user on this host, those at `addresses`, and the database that they work for. A sample
    that is younger than `fresh` seconds is shown again, and rates are of looks no further apart than `max_gap`."""

    def __init__(
        self,
        dsn: str,
        *,
        pooled: bool,
        addresses: Sequence[str] = (),
        fresh: float = 0.0,
        max_gap: float = float("inf"),
    ) -> None:
        self._database = FleetDatabase(dsn, pooled=pooled)
        self._local = LocalFleets()
        self._remote = RemoteFleets(addresses)
        self._fresh, self._max_gap = fresh, max_gap
        self._history = TopHistory()
        self._turn = asyncio.Lock()
        self._last: tuple[float, TopFrame] | None = None

    async def look(self) -> TopFrame:
        """Return what happens now."""
        async with self._turn:
            now = time.monotonic()
            if self._last is not None and now - self._last[0] < self._fresh:
                return self._last[1]
            if self._last is not None and now - self._last[0] > self._max_gap:
                self._history = TopHistory()
            database, (remote, silent) = await asyncio.gather(self._database.sample(), self._remote.sample())
            seen = FleetsSample(time.monotonic(), _once((*self._local.sample(), *remote)), silent)
            frame = self._history.frame(database, seen, time.time())
            self._last = now, frame
            return frame

    async def aclose(self) -> None:
        """Close the connection and the files."""
        await self._database.close()
        self._local.close()


def _once(fleets: Sequence[SeenFleet]) -> tuple[SeenFleet, ...]:
    """Leave out a supervisor that is seen again, by another name."""
    return tuple({(one.snapshot.pid, one.snapshot.started): one for one in reversed(fleets)}.values())[::-1]
