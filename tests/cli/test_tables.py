"""Tables on terminals: from 60 columns upwards no line is longer than the terminal is wide."""

from __future__ import annotations

import random
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from uuid import UUID

import pytest

from pgtask._cli.commands.list import list_lines
from pgtask._cli.commands.run import checkpoint_lines, page_lines
from pgtask._cli.commands.runs import run_lines
from pgtask._cli.commands.show import show_lines
from pgtask._cli.commands.stats import report_lines
from pgtask._cli.tables import Column, Screen, table_lines
from pgtask._postgres.runs import CheckpointRow, RunStatus
from pgtask._postgres.statistics import LaneCount, OpenTransaction, Statistics
from pgtask._postgres.tasks import TaskRow

NOW = datetime(2026, 11, 29, 12, tzinfo=UTC)
WIDTHS = [60, 61, 72, 80, 100, 120, 200]


def name(most: int) -> str:
    return "".join(random.choice("abcXYZ_ 日é") for _ in range(random.randint(1, most))).strip() or "x"


def time() -> datetime:
    return NOW + timedelta(seconds=random.choice([-1, 1]) * 10 ** random.uniform(0, 10))


def task(state: str) -> TaskRow:
    return TaskRow(
        id=UUID(int=random.getrandbits(128)),
        state=state,
        step=f'{{"{name(60)}":{{"{name(60)}":{{"n":{random.getrandbits(200)}}}}}}}',
        queue=random.choice(["default", name(80)]),
        priority=random.choice([0, -32768]),
        key=name(200),
        tried=random.choice([0, 12345]),
        claims=random.choice([0, 1, 17]),
        position=random.choice([0, 99]),
        wakeup_at=time(),
        created_at=time(),
        updated_at=time(),
        locked_by=UUID(int=random.getrandbits(128)) if state == "leased" else None,
        lock_expires_at=time() if state == "leased" else None,
        behind=time() if state == "scheduled" and random.random() < 0.5 else None,
        behind_id=UUID(int=random.getrandbits(128)) if random.random() < 0.5 else None,
        expires_at=None,
        error=name(300) if state == "parked" else None,
        seen_at=NOW,
    )


def status() -> RunStatus:
    return RunStatus(
        id=UUID(int=random.getrandbits(128)),
        name=name(80),
        state=random.choice(["CANCELLED", "ERROR", "RUNNING"]),
        version=17,
        parent=UUID(int=1),
        last_step=name(80),
        recorded=123_456,
        waits_on=random.choice([None, f"signal {name(60)}"]),
        due_at=time(),
        tried=3,
        error=random.choice([None, name(300)]),
        created_at=time(),
        started_at=time(),
        ended_at=time(),
        step='{"x":{"Run":"' + "x" * 300 + '"}}',
        input='"' + "x" * 300 + '"',
        output='"' + "y" * 300 + '"',
        unread_signals={name(60): 3},
        seen_at=NOW,
    )


def checkpoint(number: int) -> CheckpointRow:
    return CheckpointRow(
        number=number * 10_001,
        place=".".join(str(random.getrandbits(20)) for _ in range(random.randint(1, 6))),
        kind=random.choice(["step", "signal", "sleep", "child"]),
        name=name(80),
        result=random.choice([None, '"' + "z" * 300 + '"']),
        error=None,
        due_at=random.choice([None, time()]),
        tried=2,
        seconds=12_345.678,
        recorded_at=time(),
    )


def report() -> Statistics:
    lanes = tuple(
        LaneCount(
            queue=name(80),
            priority=-32768,
            ready=100_000,
            scheduled=100_000,
            leased=100_000,
            parked=100_000,
            expired_leases=100_000,
            at_least=("ready", "scheduled", "leased", "parked"),
            oldest_due=time(),
            next_due=time(),
        )
        for _ in range(5)
    )
    return Statistics(
        lanes=lanes,
        rows=123_456_789,
        dead_rows=123_456_789,
        table_bytes=10**12,
        index_bytes=10**12,
        vacuumed_at=time(),
        oldest_transaction=OpenTransaction(
            pid=1, name="a" * 40, state="idle in transaction", began_at=NOW - timedelta(1)
        ),
        seen_at=NOW,
    )


def width(line: str) -> int:
    return len(line) + line.count("日")


def all_tables(screen: Screen) -> Iterator[str]:
    states = ("leased", "ready", "scheduled", "parked")
    for rows in ([task(state) for state in states], [task("ready")], [task("parked")]):
        yield from list_lines(rows, screen)
    yield from run_lines([status() for _ in range(5)], screen)
    yield from checkpoint_lines([checkpoint(number) for number in range(5)], NOW, screen)
    yield from report_lines(report(), screen)


@pytest.mark.parametrize("columns", WIDTHS)
@pytest.mark.parametrize("seed", range(20))
def test_no_line_of_a_table_wraps(columns: int, seed: int) -> None:
    random.seed(seed)
    for line in all_tables(Screen(columns)):
        assert width(line) <= columns, line


@pytest.mark.parametrize("columns", WIDTHS)
def test_no_line_of_a_head_wraps(columns: int) -> None:
    random.seed(columns)
    for row in (task("leased"), task("parked")):
        head = "\n".join(show_lines(row, Screen(columns))).split("\n\n")[0]
        assert all(len(line) <= columns for line in head.splitlines()), head
    head = "\n".join(page_lines(status(), Screen(columns))).split("\n\n")[0]
    assert all(len(line) <= columns for line in head.splitlines()), head


def test_nothing_is_cut_or_left_out_in_a_pipe() -> None:
    random.seed(1)
    rows = [task(state) for state in ("leased", "parked")]
    shown = "\n".join(list_lines(rows, Screen()))
    for row in rows:
        assert str(row.id) in shown
        assert row.queue in shown
    assert "…" not in shown


def test_narrow_terminal_leaves_out_columns_by_rank() -> None:
    columns: list[Column[None]] = [
        Column("id", lambda _: "0123456712345678", is_id=True),
        Column("usual", lambda _: "-", usual="-"),
        Column("name", lambda _: "the_beginning_of_a_name_and_its_end", is_name=True),
        Column("least", lambda _: "1" * 10, rank=1),
        Column("more", lambda _: "2" * 10, rank=2),
    ]

    def shown(columns_of_screen: int) -> list[str]:
        return list(table_lines(columns, [None], Screen(columns_of_screen)))

    assert shown(90)[0].split() == ["id", "usual", "name", "least", "more"]
    assert shown(70)[0].split() == ["id", "name", "least", "more"]
    assert "the_beginning_of_a_name_and_its_end" in shown(70)[1]
    assert shown(60)[1].split() == ["12345678", "the_beginning…_and_its_end", "1" * 10, "2" * 10]
    assert shown(50)[0].split() == ["id", "name", "more"]
    assert shown(25)[0].split() == ["id", "name"]
    assert shown(25)[1] == "12345678  the_beg…its_end"
