"""The file of pages: what a reader sees of what writers have counted."""

from __future__ import annotations

import os
import time

import pytest

from pgtask._fastpath import bytes_in_use, read_page
from pgtask._observe import pages
from pgtask._observe.pages import BOUNDS, Histogram, Pages


def begin(fleet: Pages, number: int) -> pages.PageWriter:
    writer = fleet.take()
    writer.page.begin(os.getpid(), number, time.time())
    return writer


def test_a_page_keeps_its_counters_for_the_next() -> None:
    fleet = Pages(2)
    first = begin(fleet, 1)
    first.page.note_claim(10)
    fleet.give_back(first)
    assert (pages.read(fleet.fd).claimed, pages.read(fleet.fd).workers) == (10, ())
    second = begin(fleet, 7)
    assert second.index == first.index
    second.page.note_claim(5)
    snapshot = pages.read(fleet.fd)
    assert (snapshot.claims, snapshot.claimed) == (2, 15)
    assert [(worker.number, worker.pid) for worker in snapshot.workers] == [(7, os.getpid())]


@pytest.mark.parametrize("size", [0, 1, 4095])
def test_file_that_has_no_page_yet_is_none(size: int) -> None:
    assert read_page(bytes(size)) is None
    assert bytes_in_use(bytes(size)) == 0


def test_two_living_processes_share_no_page() -> None:
    fleet = Pages(1)
    one, other = begin(fleet, 1), begin(fleet, 1)
    assert one.index != other.index
    one.page.note_claim(1)
    other.page.note_claim(2)
    assert pages.read(fleet.fd).claimed == 3


def test_a_program_beside_it_finds_the_file() -> None:
    fleet = Pages(3)
    begin(fleet, 1).page.note_lag(0.2)
    ours = [path for path in pages.find() if path.parts[2] == str(os.getpid()) or path.parts[2] == "self"]
    snapshots = [pages.read(path) for path in ours]
    assert os.getpid() in [snapshot.pid for snapshot in snapshots]


def test_a_page_that_is_not_begun_is_no_worker() -> None:
    fleet = Pages(1)
    fleet.take()
    snapshot = pages.read(fleet.fd)
    assert (snapshot.pid, snapshot.workers, snapshot.steps) == (os.getpid(), (), ())


def test_another_version_is_refused() -> None:
    fleet = Pages(1)
    os.pwrite(fleet.fd, b"\xff" * 8, 8)
    with pytest.raises(ValueError, match="another version of pgtask"):
        pages.read(fleet.fd)


def test_quantiles_lie_in_their_bucket() -> None:
    assert Histogram().quantile(0.5) is None
    buckets = [0] * (len(BOUNDS) + 1)
    buckets[3] = 100
    assert BOUNDS[2] < (Histogram(1.0, tuple(buckets)).quantile(0.5) or 0) < BOUNDS[3]
    buckets[-1] = 1000
    assert Histogram(1.0, tuple(buckets)).quantile(0.95) == BOUNDS[-1]
