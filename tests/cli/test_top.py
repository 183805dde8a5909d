"""`pgtask top`: its screens at several sizes, its keys, one look for programs, and a fleet at work in a terminal."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import os
import pty
import re
import select
import signal
import struct
import subprocess
import sys
import termios
import time
import unicodedata
from collections.abc import Callable, Iterator
from functools import reduce
from typing import Any
from uuid import UUID

import msgspec
import pytest
from counted import Awaits, Plain, Refused
from exported import ANY_PORT, APP, Exported
from fix_commands import LEASED, PARKED, Command, insert, query
from fix_database import fresh_database
from fleet import put, working
from paths import PYTHONPATH
from proxy import Line as Proxy

from pgtask._cli.top_keys import press
from pgtask._cli.top_lines import TopView, plain_lines, screen_lines
from pgtask._observe.database import QueueDepth
from pgtask._observe.fleet_database import DatabaseSample, FleetDatabase, LeasedTask, Session, Traffic
from pgtask._observe.fleets import FleetsSample, SeenFleet
from pgtask._observe.pages import Histogram, Snapshot, StepCounts, StepEdge
from pgtask._observe.remote_fleets import RemoteFleets, parse_address
from pgtask._observe.top import QueueRow, StepRates, TopFrame, TopHistory, WorkerRow

ENTERS, LEAVES, RED = "\x1b[?1049h", "\x1b[?1049l", "\x1b[31m"
FIRST = TopView()
SIZES = [(80, 24), (200, 50), (60, 12), (20, 6), (132, 43)]


def step(name: str, **fields: Any) -> StepRates:
    numbers = {"runs": 12.5, "errors": 0.0, "run_p50": 0.012, "run_p95": 0.25, "wait_p50": None, "wait_p95": 3.5}
    return StepRates(step=name, **{**numbers, "done": 123_456, "parked": 0, **fields})


def queue(name: str, **numbers: Any) -> QueueRow:
    return QueueRow(queue=name, **{"due": 5, "leased": 2, "oldest_due": 61.0, "growth": -3.0, **numbers})


HERE = WorkerRow(
    worker="4242/1", host="here", pid=4243, state="ready", leases=7, executing=3, waiting=4, unwritten=1, runs=99.5
)
THERE = WorkerRow(worker="0011aabb", host="10.0.0.7", pid=77, leases=5)
LONGEST = tuple(
    LeasedTask(id=UUID(int=at), queue="reports", step="Report.Build", worker="4242/1", seconds=100.0 - at)
    for at in range(20)
)
FRAME = TopFrame(
    seen_at=1_796_000_000.0,
    answered_at=1_796_000_000.0,
    supervisors=(4242,),
    added=10.0,
    removed=2000.0,
    queues=(queue("mail"), queue("orders", due=9_000, estimated=("due",)), *(queue(f"q{at:02}") for at in range(60))),
    steps=(step("Order.Charge", runs=400.0, errors=2.0), step("Order.Ship"), step("Mail." + "Long" * 40)),
    workers=(HERE, THERE),
    longest=LONGEST,
)


WIDE = msgspec.structs.replace(FRAME, queues=(queue("日本" * 40),), steps=(step("日本." + "本" * 60, errors=1.0),))


def width(text: str) -> int:
    return sum(2 if unicodedata.east_asian_width(char) in "WF" else 1 for char in text)


def screen(view: TopView = FIRST, size: tuple[int, int] = (80, 24), frame: TopFrame = FRAME) -> list[str]:
    return [line.text for line in screen_lines(frame, view, *size)]


def pressed(keys: str, view: TopView = FIRST) -> TopView:
    def one(view: TopView, key: str) -> TopView:
        found = press(view, key)
        assert found is not None
        return found

    return reduce(one, keys, view)


# --- the screen ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("keys", ["1", "2", "3", "?", "/long", "2sss"])
@pytest.mark.parametrize(
    "frame", [FRAME, WIDE, TopFrame(seen_at=0.0), TopFrame(seen_at=0.0, database="日本\nand " * 60)]
)
def test_a_screen_fits_its_terminal(size: tuple[int, int], keys: str, frame: TopFrame) -> None:
    lines = screen(pressed(keys), size, frame)
    assert len(lines) == size[1]
    assert max(map(width, lines)) <= size[0]
    assert all(line.isprintable() for line in lines)


def test_tall_screens_show_more_rows() -> None:
    assert len([line for line in screen(size=(80, 24)) if " 1m" not in line and line.startswith("q")]) < 20
    assert any(re.fullmatch(r"\d+ more: filter them by f", line) for line in screen())
    tall = screen(size=(200, 100))
    assert sum(line.startswith("q") for line in tall) == 61  # with the head
    assert sum(line.startswith("Report.Build") for line in tall) == 20


def test_each_page_names_what_it_shows() -> None:
    queues, steps, workers = (" ".join(screen(pressed(keys), (200, 50))) for keys in "123")
    assert "~9,000" in queues
    assert "in 10/s  out 2,000/s  due ~9,305  leased 124  parked 0" in queues
    assert re.search(r"Order.Charge\s+400\s+2\s+12 ms\s+250 ms\s+-\s+3.5 s\s+123,456\s+0", steps)
    assert re.search(r"4242/1\s+here\s+4243\s+ready\s+100\s+-\s+7\s+3\s+4\s+1", workers)
    assert re.search(r"0011aabb\s+10.0.0.7\s+77\s+-\s+-\s+-\s+5\s+-", workers)
    assert all("Report.Build  100 s" in page for page in (queues, steps, workers))
    assert "2 workers, 1 of them here" in queues


def test_a_missing_database_and_missing_counters_are_named() -> None:
    gone = msgspec.structs.replace(FRAME, database="connection refused", seen_at=FRAME.seen_at + 5)
    assert re.fullmatch(r"no database \(what it said is of \d\d:\d\d:20\): connection refused", screen(frame=gone)[1])
    assert "orders" in " ".join(screen(frame=gone))
    bare = msgspec.structs.replace(FRAME, supervisors=(), steps=())
    assert "start it with --metrics PORT" in screen(frame=bare)[2]
    assert "no steps" in screen(pressed("2"), frame=bare)
    assert "no database: refused" in screen(frame=TopFrame(seen_at=0.0, database="refused"))


def test_failing_steps_are_marked() -> None:
    lines = screen_lines(FRAME, pressed("2"), 80, 24)
    assert [line.text.split()[0] for line in lines if line.style == "bad"] == ["Order.Charge"]


def test_plain_lines_have_all_pages_uncut() -> None:
    text = "\n".join(plain_lines(FRAME))
    assert all(name in text for name in ("q59", "Mail." + "Long" * 40, "0011aabb", str(UUID(int=3))))


# --- the keys -----------------------------------------------------------------------------------------------


def test_keys_sort_by_each_column_in_turn() -> None:
    def first(keys: str) -> str:
        lines = screen(pressed(keys), (200, 24))
        at = next(at for at, line in enumerate(lines) if line.startswith("step"))
        assert lines[at].count("*") == 1
        return lines[at + 1].split()[0]

    assert first("2") == "Order.Charge"  # by runs a second
    assert first("2S").startswith("Mail.Long")  # by name
    assert first("2" + "s" * 9) == first("2")
    view = pressed("2s1s2")
    assert view.sorts == {"steps": 2, "queues": 2}


def test_keys_filter_and_pause() -> None:
    typing = pressed("/MAix\x7f")
    assert screen(typing)[-1] == "filter: MAi_"
    assert [line.split()[0] for line in screen(typing)[4:5]] == ["mail"]
    view = pressed("\r", typing)
    assert (view.filter, view.typed) == ("MAi", None)
    assert pressed("fq", view).typed == "MAiq"  # q is a letter now
    assert pressed("\x1b", view).filter == pressed("f\x1b", view).filter == ""
    assert "PAUSED" in screen(pressed("p"))[0]
    assert pressed("pp") == pressed("") == pressed("z") == pressed("?x")
    assert press(FIRST, "q") is None
    assert "no queues with 'zzz'" in screen(pressed("/zzz\n"))


# --- what is measured ---------------------------------------------------------------------------------------


def sample(at: float, due: int, inserted: int, *, estimate: bool = False) -> DatabaseSample:
    depth = (QueueDepth("default", "due", due, estimate, 2.0), QueueDepth("default", "parked", 1, False, None))
    return DatabaseSample(depth=depth, traffic=Traffic(inserted, 0, at), sessions=(Session(7, "ab" * 8, "10.0.0.1"),))


def test_rates_are_of_the_last_seconds_and_unknown_at_first() -> None:
    history = TopHistory()
    frames = [
        history.frame(sample(at, 10 * at**2, 100 * at**2), FleetsSample(float(at)), 1000.0 + at) for at in range(12)
    ]
    assert (frames[0].added, frames[0].queues[0].growth) == (None, None)
    assert (frames[11].added, frames[11].removed, frames[11].queues[0].growth) == (1700.0, 0.0, 170.0)
    gone = history.frame(DatabaseSample(error="gone"), FleetsSample(12.0), 1012.0)
    assert (gone.database, gone.added, gone.answered_at) == ("gone", None, 1011.0)
    assert gone.queues[0].due == 1210
    about = history.frame(sample(13, 1, 50_000, estimate=True), FleetsSample(13.0), 1013.0)
    assert (about.queues[0].estimated, about.queues[0].growth, about.database) == (("due",), None, None)
    assert [(worker.host, worker.pid, worker.cpu) for worker in about.workers] == [("10.0.0.1", 7, None)]


def counted_fleet(host: str, at: float, runs: int, started: float = 1.0) -> SeenFleet:
    took = Histogram(float(runs), (0, runs, *(0,) * 19))
    steps = (StepCounts(task="Order", step="Charge", run=took, next=runs, retried=runs // 10),)
    edges = (StepEdge(task="Order", step="Charge", next="Ship", count=runs),)
    counters: dict[str, Any] = {"claims": 0, "claimed": 0, "flushes": 0, "flushed": 0, "busy": 0.0, "lag": Histogram()}
    snapshot = Snapshot(
        pid=1, wanted=1, started=started, heard=at, is_stopping=False, workers=(), steps=steps, edges=edges, **counters
    )
    return SeenFleet(snapshot=snapshot, clock=at, host=host)


def test_rates_are_of_fleets_that_both_looks_have() -> None:
    history = TopHistory()

    def look(at: float, *fleets: SeenFleet, silent: tuple[str, ...] = ()) -> TopFrame:
        return history.frame(DatabaseSample(), FleetsSample(at, fleets, silent), 1000.0 + at)

    first = look(0.0, counted_fleet("a", 0.0, 1000))
    assert (first.steps[0].runs, first.steps[0].done, first.edges[0].rate) == (None, 1000, None)
    # Another host answers now: what it has counted before is in no rate.
    both = look(1.0, counted_fleet("a", 1.0, 1020), counted_fleet("b", 1.0, 50_000))
    assert (both.steps[0].runs, both.steps[0].errors, both.steps[0].done) == (20.0, 2.0, 51_020)
    assert (both.edges[0].tasks, both.edges[0].rate) == (51_020, 20.0)
    gone = look(2.0, counted_fleet("b", 2.0, 50_030), silent=("a: no answer",))
    assert (gone.steps[0].runs, gone.edges[0].rate, gone.silent) == (None, None, ("a: no answer",))
    assert screen(frame=gone)[2] == "a: no answer"
    # A supervisor with the pid of an earlier one counts from zero.
    anew = look(3.0, counted_fleet("b", 3.0, 7, started=2.5))
    assert (anew.steps[0].runs, anew.steps[0].done) == (None, 7)


def test_workers_with_one_pid_on_two_hosts_are_two() -> None:
    sessions = (Session(7, "ab" * 8, "10.0.0.1"), Session(7, "cd" * 8, "10.0.0.2"))
    found = DatabaseSample(sessions=sessions, leases={"cd" * 8: 3, "ef" * 8: 1})
    frame = TopHistory().frame(found, FleetsSample(0.0), 1000.0)
    rows = [(row.host, row.pid, row.leases, row.state) for row in frame.workers]
    assert rows == [("10.0.0.1", 7, 0, ""), ("10.0.0.2", 7, 3, ""), ("?", None, 1, "no connection")]
    hidden = TopHistory().frame(DatabaseSample(leases={"ef" * 8: 1}), FleetsSample(0.0), 1000.0)
    assert [row.state for row in hidden.workers] == [""]  # behind a pooler nothing tells whether it is connected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("worker-7:9464", "http://worker-7:9464"),
        ("https://worker-7/metrics", "https://worker-7"),
        ("[::1]:9464", "http://[::1]:9464"),
        ("ftp://worker-7:9464", None),
        ("http://", None),
        ("worker-7:port", None),
        ("a b:1", None),
        ("http://me:secret@worker-7:9464", None),
    ],
)
def test_an_address_of_from_is_checked(database: str, command: Command, text: str, expected: str | None) -> None:
    if expected is not None:
        assert parse_address(text) == expected
        return
    said = command("top", "--once", "--from", text)
    assert said.code == 2
    assert "as http://worker-7:9464" in said.err


def test_leases_are_counted_by_worker_and_age(database: str) -> None:
    holder = "00112233-4455-6677"
    now = int(time.time() * 1e6)
    for age in (900, 300):
        token = f"{now - age * 1_000_000:016x}"
        old = {"created_at": "now() - interval '1 h'", "updated_at": "now() - interval '1 h'"}
        insert(database, **{**LEASED, **old, "locked_by": f"'{holder}-{token[:4]}-{token[4:]}'"})
    foreign = {**LEASED, "locked_by": "'ffffffff-ffff-4fff-bfff-ffffffffffff'"}
    insert(database, **foreign, updated_at="now() - interval '10 min'")
    insert(database, **PARKED)

    async def look() -> DatabaseSample:
        fleet = FleetDatabase(database, pooled=False)
        try:
            return await fleet.sample()
        finally:
            await fleet.close()

    found = asyncio.run(look())
    assert found.error is None
    assert found.leases == {"0011223344556677": 2, "ffffffffffff4fff": 1}
    ages = sorted((task.worker[:4], round(task.seconds, -2)) for task in found.longest)
    assert ages == [("0011", 300.0), ("0011", 900.0), ("ffff", 600.0)]


# --- a fleet at work ----------------------------------------------------------------------------------------


def test_one_look_at_a_fleet_for_people_and_programs(database: str, command: Command) -> None:
    put(database, *[Plain()] * 500, *[Refused()] * 3)
    with working(database, *ANY_PORT, procs=2, app=APP) as fleet:
        put(database, *[Awaits(60)] * 5, queue="slow")

        def look() -> Any:
            (frame,) = command("top", "--once", "--json", "--interval", "0.2").objects
            return frame

        def is_whole(frame: Any) -> bool:  # a worker fills in its page once a second
            leased = {(row["queue"], row["leased"]) for row in frame["queues"]}
            ours = [row for row in frame["workers"] if row["worker"].startswith(f"{fleet.process.pid}/")]
            return ("slow", 5) in leased and all(row["state"] == "ready" for row in ours)

        frame = until(look, is_whole)
        assert frame["database"] is None
        assert fleet.process.pid in frame["supervisors"]
        steps = {row["step"]: row for row in frame["steps"]}
        assert (steps["Counted.Plain"]["done"], steps["Counted.Refused"]["parked"]) == (500, 3)
        ours = [row for row in frame["workers"] if row["worker"].startswith(f"{fleet.process.pid}/")]
        assert sorted(row["worker"][-2:] for row in ours) == ["/1", "/2"]
        assert sum(row["leases"] for row in ours) == 5
        assert all(row["rss"] > 1e6 and row["cpu"] is not None and row["state"] == "ready" for row in ours)
        assert {row["step"] for row in frame["longest"]} == {"Counted.Awaits"}
        assert {row["worker"] for row in frame["longest"]} <= {row["worker"] for row in ours}
        address = f"http://127.0.0.1:{Exported(fleet).port}"
        assert_asked_by_address(address, fleet.process.pid, ours)
        said = command("top", "--once", "--interval", "0.2", "--from", f"{address}/metrics", "--from", "127.0.0.1:9")
        assert (said.code, said.err) == (0, "")
        assert "http://127.0.0.1:9: Connection refused" in said.out
        assert len(re.findall(rf"^{fleet.process.pid}/2 ", said.out, re.MULTILINE)) == 1  # not once more by its address
        assert all(text in said.out for text in ("Counted.Plain", "slow", "runs longest", f"{fleet.process.pid}/2"))
        fleet.send(signal.SIGQUIT)
        assert fleet.ends() == 0


def assert_asked_by_address(address: str, pid: int, workers: list[Any]) -> None:
    """What the exporter says of a supervisor is what its pages say here."""
    (seen,), silent = asyncio.run(RemoteFleets([address]).sample())
    assert (seen.host, seen.snapshot.pid, silent) == (address.removeprefix("http://"), pid, ())
    assert {step.step: step.done for step in seen.snapshot.steps}["Plain"] == 500
    assert sorted(worker.pid for worker in seen.snapshot.workers) == sorted(row["pid"] for row in workers)
    assert all(usage.rss > 1e6 for usage in seen.usage.values())
    assert len(seen.usage) == 2


@pytest.fixture
def other_dsn(cluster: str, template: str) -> Iterator[str]:
    yield from fresh_database(cluster, template)


def test_a_fleet_of_another_database_is_left_out(database: str, command: Command, other_dsn: str) -> None:
    with working(other_dsn, *ANY_PORT, app=APP) as fleet:

        def seen() -> Any:
            return (
                fleet.process.pid in command("top", "--once", "--json", "--interval", "0.2").objects[0]["supervisors"]
            )

        until(seen, lambda is_seen: not is_seen)  # as soon as its workers are known
        fleet.send(signal.SIGTERM)
        assert fleet.ends() == 0


def test_without_a_terminal_it_says_what_to_do(database: str, command: Command) -> None:
    said = command("top")
    assert (said.code, said.out) == (2, "")
    assert "needs a terminal; for one look without a terminal: pgtask top --once, or for programs: --json" in said.err
    assert "is not from 0.2 s to 1 h" in command("top", "--interval", "0").err


def until(look: Callable[[], Any], holds: Callable[[Any], bool], timeout: float = 30) -> Any:
    deadline = time.monotonic() + timeout
    while not holds(found := look()):
        assert time.monotonic() < deadline, found
    return found


class Terminal:
    """`pgtask top` in a terminal of its own; `seen` is all that it has written since the last key."""

    def __init__(self, dsn: str, size: tuple[int, int] = (80, 24), **environ: str) -> None:
        self._terminal, inner = pty.openpty()
        self.resize(*size)
        self.process = subprocess.Popen(
            [sys.executable, "-W", "error", "-m", "pgtask", "top", "--dsn", dsn, "--interval", "0.2"],
            env={**os.environ, "PYTHONPATH": PYTHONPATH, "TERM": "xterm-256color", **environ},
            stdin=inner,
            stdout=inner,
            stderr=subprocess.PIPE,
            start_new_session=True,
        )
        os.close(inner)
        self.seen = ""

    def resize(self, columns: int, lines: int) -> None:
        fcntl.ioctl(self._terminal, termios.TIOCSWINSZ, struct.pack("HHHH", lines, columns, 0, 0))

    def type(self, keys: str) -> None:
        self.seen = ""
        os.write(self._terminal, keys.encode())

    def until(self, text: str, timeout: float = 30, *, again: bool = False) -> None:
        """Read until a text has been written: since the last key, or once more."""
        deadline = time.monotonic() + timeout
        self.seen = "" if again else self.seen
        while text not in re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", " ", self.seen):
            left = deadline - time.monotonic()
            assert left > 0, (text, self.seen)
            self.read(left)

    def read(self, seconds: float) -> None:
        """Read what has been written, or is within these seconds."""
        if select.select([self._terminal], [], [], seconds)[0]:
            with contextlib.suppress(OSError):  # its end
                self.seen += os.read(self._terminal, 65536).decode(errors="replace")

    def close(self) -> None:
        self.process.kill()
        self.process.communicate()
        os.close(self._terminal)


@pytest.fixture
def terminal(database: str) -> Iterator[Terminal]:
    found = Terminal(database)
    yield found
    found.close()


def test_keys_work_in_a_terminal_which_is_given_back(database: str, terminal: Terminal) -> None:
    insert(database, queue="'letters'")
    terminal.until("letters")
    assert ENTERS in terminal.seen  # the screen of the shell is kept
    terminal.type("2")
    terminal.until("no steps")
    terminal.type("?")
    terminal.until("queues, steps, workers")
    terminal.type("x1/lett\r")
    terminal.until("filter: lett")
    terminal.resize(200, 50)
    os.kill(terminal.process.pid, signal.SIGWINCH)
    terminal.until("filter: lett", again=True)
    assert re.search(r"\x1b\[50(;1H|d)", terminal.seen)  # the last line is further down
    terminal.type("p")
    terminal.until("PAUSED")
    terminal.type("q")
    assert terminal.process.wait(30) == 0
    terminal.read(0)
    assert LEAVES in terminal.seen
    assert terminal.process.stderr is not None
    assert terminal.process.stderr.read() == b""


def test_without_colours_there_is_no_colour(database: str) -> None:
    insert(database, **PARKED)
    for no_color, has_colour in (("", True), ("1", False)):
        terminal = Terminal(database, NO_COLOR=no_color)
        terminal.until("parked 1")
        terminal.close()
        assert (RED in terminal.seen) == has_colour


def test_the_screen_says_that_the_database_is_gone(database: str, cluster: str, terminal: Terminal) -> None:
    insert(database, queue="'letters'")
    terminal.until("letters")
    (name,) = query(database, "SELECT current_database()")[0]
    query(cluster, f"ALTER DATABASE {name} ALLOW_CONNECTIONS false")
    query(cluster, "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = $1", name)
    terminal.until("no database (what it said is of ")
    query(cluster, f"ALTER DATABASE {name} ALLOW_CONNECTIONS true")
    terminal.type("?")
    terminal.until("in 0/s")
    terminal.type("xq")
    assert terminal.process.wait(30) == 0


def test_a_lost_answer_is_no_end_and_writes_no_log(database: str) -> None:
    insert(database, queue="'letters'")

    def watch(terminal: Terminal, swallow: Callable[[], None]) -> None:
        terminal.until("letters")
        swallow()
        terminal.until("no database")
        terminal.type("?")
        terminal.until("in 0/s")
        terminal.type("xq")
        assert terminal.process.wait(30) == 0
        assert terminal.process.stderr is not None
        assert terminal.process.stderr.read() == b""

    async def relay() -> None:
        async with Proxy(database) as line:
            terminal = Terminal(line.dsn)
            try:
                await asyncio.to_thread(watch, terminal, line.swallow)
            finally:
                terminal.close()

    asyncio.run(relay())
