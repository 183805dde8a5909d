"""A long outage of the database in the log, and leases on a suspended machine."""

from __future__ import annotations

import asyncio
import logging
import signal
import time
from typing import Any
from uuid import uuid4

import pytest
from fix_database import run
from fleet import Fleet

from pgtask import _lease_clock
from pgtask._fastpath import Leases, TaskLease
from pgtask._lease_clock import lease_clock
from pgtask._log import LogEvent
from pgtask._supervisor.outage import INITIAL_PAUSE, MAX_PAUSE, Outage
from pgtask._worker import renew

NOW = 1000.0
NOWHERE = "postgresql://ada@127.0.0.1:1/nowhere"


def lines(caplog: pytest.LogCaptureFixture) -> list[dict[str, Any]]:
    ours = [record for record in caplog.records if record.name == "pgtask.supervisor"]  # another test may have a timer
    return [dict(record.msg.fields) for record in ours if isinstance(record.msg, LogEvent)]


def test_outage_is_logged_repeatedly_once_for_all_workers(caplog: pytest.LogCaptureFixture) -> None:
    outage = Outage()
    with caplog.at_level(logging.WARNING, "pgtask.supervisor"):
        assert outage.next_line is None
        for pid in (1, 2, 3):
            outage.report(pid, "no route", NOW)
        assert outage.next_line == NOW + INITIAL_PAUSE
        for tenth in range(36_000):
            outage.log_if_due(NOW + tenth / 10, hint="wait")
    said = lines(caplog)
    assert said[0] == {"seconds": 5, "workers": 3, "error": "no route", "hint": "wait"}
    seconds = [line["seconds"] for line in said]
    assert seconds[:6] == [5, 10, 20, 40, 80, 140]
    assert len(seconds) == pytest.approx(3600 / MAX_PAUSE, abs=6)


def test_outage_that_is_over_is_not_logged(caplog: pytest.LogCaptureFixture) -> None:
    outage = Outage()
    with caplog.at_level(logging.WARNING, "pgtask.supervisor"):
        outage.report(1, "no route", NOW)
        outage.report(2, None, NOW)
        outage.report(1, None, NOW + 1)
        outage.log_if_due(NOW + 100, hint="wait")
        assert outage.next_line is None
        outage.report(2, "no route", NOW + 200)
        outage.log_if_due(NOW + 201, hint="wait")
    assert lines(caplog) == []


@pytest.mark.parametrize(("order", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_burst_on_wrong_address_logs_outage_and_can_be_stopped(order: signal.Signals, code: int) -> None:
    with Fleet(NOWHERE, "--burst", procs=2) as fleet:
        said = fleet.until("database.waiting", timeout=30)
        assert "workers=2" in said
        assert "Ctrl-C stops" in said
        fleet.send(order)
        assert fleet.ends() == code
    assert fleet.output.count("database.waiting") == 1
    assert "Traceback" not in fleet.output


def tell(loop: asyncio.AbstractEventLoop, told: asyncio.Future[Any], what: Any) -> None:
    """Set the result from the renewing thread; only the first call counts."""
    loop.call_soon_threadsafe(lambda: None if told.done() else told.set_result(what))


def test_lease_expires_while_machine_is_suspended(monkeypatch: pytest.MonkeyPatch) -> None:
    """The renewal cannot reach the database, and its clock has jumped."""
    ahead = 0.0
    monkeypatch.setattr(renew, "lease_clock", lambda: lease_clock() + ahead)

    async def main() -> None:
        nonlocal ahead
        loop = asyncio.get_running_loop()
        lost: asyncio.Future[list[TaskLease]] = loop.create_future()
        leases = Leases()
        (lease,), _ = leases.add_claimed([(uuid4(), "{}", 0, 1, None, 0.0)], uuid4(), lease_clock())
        renewing = renew.Renew(
            NOWHERE,
            leases,
            name="pgtask test renew",
            pooled=False,
            lease_timeout=60.0,
            heartbeat_interval=0.4,
            lost=lambda leases: tell(loop, lost, leases),
            refused=lambda error: tell(loop, lost, error),
        )
        ahead = 3600.0
        renewing.start()
        try:
            async with asyncio.timeout(20):
                assert await lost == [lease]
        finally:
            renewing.stop()

    run(main())


@pytest.mark.skipif(not hasattr(time, "CLOCK_BOOTTIME"), reason="only Linux counts the time of a suspend")
def test_lease_clock_counts_time_of_suspend() -> None:
    assert time.CLOCK_BOOTTIME == _lease_clock._BOOTTIME
    before = time.clock_gettime(time.CLOCK_BOOTTIME)
    assert before <= lease_clock() <= time.clock_gettime(time.CLOCK_BOOTTIME)
