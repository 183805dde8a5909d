"""`pgtask parked`: what is parked, by cause."""

from __future__ import annotations

import pytest
from fix_commands import PARKED, Command, insert, query

FILL = """
    INSERT INTO pg_task (step, queue, error, wakeup_at)
    SELECT
        format('{"Shop":{"Charge":{"customer":%s}}}', i),
        CASE WHEN i % 3 = 0 THEN 'slow' ELSE 'default' END,
        CASE i % 2
            WHEN 0 THEN format(E'httpx.Timeout: order %s_ of ''c%s'' (at /srv/charge.py:7 in run)\\ncaused by X', i, i)
            ELSE format('no card for %s', gen_random_uuid())
        END,
        '2026-01-01 00:00Z'::timestamptz + i * interval '1 s'
    FROM generate_series(1, 100) AS i
"""


def test_parked_folds_by_cause(database: str, command: Command) -> None:
    query(database, FILL)
    insert(database)
    insert(database, error="'no card for 1'", step="'nonsense'")
    timeouts, cards, other = command("parked", "--json").objects
    ((last,),) = query(database, "SELECT id::text FROM pg_task WHERE step LIKE '%:100}%'")
    assert timeouts["error"].startswith("httpx.Timeout: order 100_ of 'c100' (at")
    del timeouts["error"]
    assert timeouts == {
        "tasks": 50,
        "step": "Shop.Charge",
        "error_class": "httpx.Timeout",
        "text": "httpx.Timeout: order #_ of #",
        "place": "/srv/charge.py:7 in run",
        "first_at": "2026-01-01T00:00:02Z",
        "last_at": "2026-01-01T00:01:40Z",
        "example": last,
        "pattern": r"httpx.Timeout: order %\_ of % (at /srv/charge.py:7 in run)%",
    }
    assert (cards["tasks"], cards["error_class"], cards["text"], cards["place"]) == (50, None, "no card for #", None)
    assert (other["tasks"], other["step"]) == (1, "?")
    chosen = command("list", "--error", timeouts["pattern"], "--json", "-n", "1000").objects
    assert len(chosen) == 50


def test_parked_takes_filters(database: str, command: Command) -> None:
    query(database, FILL)
    assert [one["tasks"] for one in command("parked", "--json", "-q", "slow").objects] == [17, 16]
    assert [one["tasks"] for one in command("parked", "--json", "--error", "no card%").objects] == [50]
    assert command("parked", "--task", "Other") == (0, "", "pgtask: no parked tasks match\n")
    assert command("parked", "--task", "Shop", "--key", "a").code == 2


def test_command_of_a_cause_has_the_filters_and_stays_on_a_line(
    database: str, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    query(database, FILL)
    monkeypatch.setenv("COLUMNS", "60")
    lines = command("parked", "-q", "slow", "--age", "0").out.splitlines()
    found = [line for line in lines if line.startswith("retry")]
    assert len(found) == 2
    assert all("--queue slow --age 0s --step Shop." in line and line.endswith(" --dry-run") for line in found)


def test_parked_shows_causes_for_people(database: str, command: Command) -> None:
    assert command("parked") == (0, "", "pgtask: no parked tasks\n")
    task = insert(database, **(PARKED | {"error": "'KeyError: ''\x1b[31m'' 7 (at a.py:1 in f)'"}))
    said = command("parked")
    lines = said.out.splitlines()
    assert [line.split(maxsplit=1) for line in lines if not line.startswith("when")] == [
        ["parked", "1 Greeter.SayHello"],
        ["error", "KeyError: # #"],
        ["place", "a.py:1 in f"],
        ["example", task],
        ["retry", "pgtask retry --step Greeter.SayHello --error 'KeyError: % % (at a.py:1 in f)%' --dry-run"],
    ]
    assert said.err == "pgtask: 1 parked task of 1 cause\n"
