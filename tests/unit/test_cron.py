"""The times of cron expressions in zones, against an oracle that tries each minute."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from itertools import takewhile

import pytest
from cron_oracle import YEARS, ZONES, expressions, oracle, spans, windows

from pgtask._cron import CronError, check_cron, check_zone, last_times, next_time, times_after

MAX_SPARSE = 3_000  # occurrences in five years, about eight a week, up to which all are compared


def found(cron: str, zone: str, first: datetime, last: datetime) -> list[datetime]:
    return list(takewhile(lambda time: time <= last, times_after(cron, zone, first)))


def compare(cron: str, zone: str, parts: list[tuple[datetime, datetime]]) -> int:
    """Compare the times in some parts of the years. Return how many there are."""
    compared = 0
    for start, end in parts:
        expected = oracle(cron, zone, start, end)
        assert found(cron, zone, start, end) == expected, (cron, zone)
        compared += len(expected)
    return compared


def parts_of(cron: str, zone: str) -> list[tuple[datetime, datetime]]:
    """Return the five years of a zone; if there are many times, the days near the changes of its clock."""
    first = ZONES[zone]
    is_sparse = len(oracle(cron, zone, first, first + timedelta(days=92))) * 20 <= MAX_SPARSE
    return [(first, first.replace(year=first.year + YEARS))] if is_sparse else windows(zone)


def test_each_zone_changes_its_clock_as_it_should() -> None:
    changes = {zone: len(spans(zone)) - 1 for zone in ZONES}
    assert changes["Asia/Tokyo"] == 0
    assert changes["Europe/Berlin"] == changes["Australia/Lord_Howe"] == 10
    assert changes["Africa/Casablanca"] > 10
    assert len(ZONES) == 30


@pytest.mark.parametrize("zone", ZONES)
def test_times_agree_with_the_oracle(zone: str) -> None:
    place = list(ZONES).index(zone)
    crons = [*list(expressions(2000))[place::700], "30 2 * * *", "0,45 1-3 * * *", "*/20 0-3 * * *", "45 * * * *"]
    assert sum(compare(cron, zone, windows(zone)[:4]) for cron in crons)


@pytest.mark.faults
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("zone", ZONES)
def test_many_expressions_agree_with_the_oracle(zone: str) -> None:
    """Each of 2,000 expressions in one of the 30 zones."""
    for cron in list(expressions(2000))[list(ZONES).index(zone) :: 30]:
        compare(cron, zone, parts_of(cron, zone))


def at(text: str) -> datetime:
    return datetime.fromisoformat(text)


@pytest.mark.parametrize(
    ("cron", "zone", "after", "expected"),
    [
        # Clocks go forward over a fixed time, back over one, and past others that go by the clock on the wall.
        ("30 2 * * *", "Europe/Berlin", "2026-03-28T12:00+01:00", ["2026-03-29T03:00+02:00", "2026-03-30T02:30+02:00"]),
        ("30 2 * * *", "Europe/Berlin", "2026-10-24T12:00+02:00", ["2026-10-25T02:30+02:00", "2026-10-26T02:30+01:00"]),
        ("30 * * * *", "Europe/Berlin", "2026-03-29T01:00+01:00", ["2026-03-29T01:30+01:00", "2026-03-29T03:30+02:00"]),
        ("30 * * * *", "Europe/Berlin", "2026-10-25T02:00+02:00", ["2026-10-25T02:30+02:00", "2026-10-25T02:30+01:00"]),
        ("45 * * * *", "Australia/Lord_Howe", "2026-10-04T01:46+10:30", ["2026-10-04T02:45+11:00"]),
        ("0 12 * * *", "Pacific/Apia", "2011-12-29T13:00-10:00", ["2011-12-31T00:00+14:00", "2011-12-31T12:00+14:00"]),
        ("0 0 * * *", "Asia/Beirut", "2026-03-28T12:00+02:00", ["2026-03-29T01:00+03:00", "2026-03-30T00:00+03:00"]),
        # Seconds, names, the rule of days, aliases.
        ("*/20 * * * * *", "UTC", "2026-01-01T00:00:05Z", ["2026-01-01T00:00:20Z", "2026-01-01T00:00:40Z"]),
        ("0 0 13 * FRI", "UTC", "2026-02-01T00:00Z", ["2026-02-06T00:00Z", "2026-02-13T00:00Z"]),
        ("0 0 * * FRI", "UTC", "2026-02-01T00:00Z", ["2026-02-06T00:00Z", "2026-02-13T00:00Z"]),
        ("0 0 * 4-4/5 *", "UTC", "2026-04-29T00:00Z", ["2026-04-30T00:00Z", "2027-04-01T00:00Z"]),
        ("@Monthly", "UTC", "2026-02-01T00:00Z", ["2026-03-01T00:00Z"]),
        ("0 0 29 2 *", "UTC", "2026-02-01T00:00:00.5Z", ["2028-02-29T00:00Z"]),
    ],
)
def test_times_of_an_expression(cron: str, zone: str, after: str, expected: list[str]) -> None:
    last = at(after)
    for time in map(at, expected):
        assert next_time(cron, zone, last) == time
        last = time


def test_last_times_are_the_end_of_all_times() -> None:
    before, until = datetime(2025, 10, 1, tzinfo=UTC), datetime(2025, 11, 1, 11, 30, tzinfo=UTC)
    for cron in ("7 * * * *", "7 0 * * *", "7 */5 * * *"):
        everything = found(cron, "Europe/Berlin", before, until)
        for limit in (1, 2, 30, 10_000):
            assert last_times(cron, "Europe/Berlin", everything[0], until, limit) == everything[-limit:]
    first = datetime(2025, 10, 1, 0, 7, tzinfo=UTC)
    assert last_times("7 * * * *", "UTC", first, first - timedelta(seconds=1), 5) == []
    assert last_times("7 * * * *", "UTC", first, first, 5) == [first]


def test_much_of_the_past_is_not_read() -> None:
    first, until = datetime(1990, 1, 1, tzinfo=UTC), datetime(2026, 1, 1, tzinfo=UTC)
    assert len(last_times("* * * * * *", "Europe/Berlin", first, until, 100)) == 100  # of a billion


@pytest.mark.parametrize("cron", ["", "x", "0 3 * *", "0 0 30 2 *", "60 * * * *", "@reboot", "* * * * * * *"])
def test_bad_expressions_are_refused(cron: str) -> None:
    with pytest.raises(CronError, match=r"minute hour day month weekday|name a date that exists"):
        check_cron(cron)


@pytest.mark.parametrize("zone", ["", "Mars", "Europe/", "../UTC", "/etc/localtime", "Europe/Berlin\0"])
def test_bad_zones_are_refused(zone: str) -> None:
    with pytest.raises(CronError, match="no such time zone"):
        check_zone(zone)
