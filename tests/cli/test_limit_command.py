"""`pgtask limit`, and what `pgtask list` and `show` say of tasks that wait for a limit."""

from __future__ import annotations

import asyncio
import re
from datetime import timedelta

import pytest
from fix_commands import Command, query
from sessions import connected

from pgtask import Breaker, Limit, Rate
from pgtask._cli.quantities import format_rate
from pgtask._postgres.limits import declaration
from pgtask._postgres.store import statement
from pgtask.errors import DefinitionError

WAIT = """
INSERT INTO pg_task (step, limit_key, limit_at, wakeup_at, locked_by, lock_expires_at)
SELECT '{"Crawl":{"Fetch":null}}', 'host ' || key, now(), 'infinity', token, CASE WHEN token IS NOT NULL THEN now() END
FROM unnest($1::text[], $2::uuid[]) AS task (key, token)
RETURNING id
"""
PAUSE = """
INSERT INTO pg_task_limit_keys (limit_key, failures, paused_until)
SELECT key, failures, now() + interval '1 min' FROM unnest($1::text[], $2::int[]) AS one (key, failures) RETURNING 1
"""
RULES = (
    "SELECT concurrency, rate, burst, cost_rate, changed, paused_until > now() + interval '9 min' FROM pg_task_limits"
)


def declare(dsn: str, *limits: Limit) -> None:
    async def main() -> None:
        async with connected(dsn) as connection:
            await connection.execute(statement("limits/declare"), *declaration(limits))

    asyncio.run(main())


def host(**changes: object) -> Limit:
    return Limit(**{"name": "host", "key": str, "concurrency": 2, "rate": Rate(10), **changes})  # type: ignore[arg-type]


def test_limits_and_their_keys_are_shown(database: str, command: Command) -> None:
    assert command("limit") == (0, "there are no limits\n", "")
    declare(database, host(), Limit("provider", cost=Rate(60_000, per=Rate(1).per * 60, of="tokens")))
    tokens = ["00000000-0000-4000-8000-000000000001", None, None]
    ids = query(database, WAIT, ["a.example", "a.example", "b.example"], tokens)
    text = command("limit").out
    assert [line.split()[:3] for line in text.splitlines()[1:]] == [["host", "2", "10/s"], ["provider", "-", "-"]]
    assert "1,000 tokens/s, burst 100" in text
    keys = command("limit", "host").out
    assert ["a.example", "1", "1"] in [line.split()[:3] for line in keys.splitlines()]
    assert ["b.example", "0", "1"] in [line.split()[:3] for line in keys.splitlines()]
    (shown,) = command("limit", "host", "--json").objects
    assert (shown["running"], shown["waiting"], len(shown["keys"])) == (1, 2, 2)
    assert "limit host b.example" in command("list", "--state", "scheduled").out
    assert "host a.example, due " in command("show", str(ids[1][0])).out


def test_rules_are_shown_as_people_say_them(database: str, command: Command) -> None:
    slow = Rate(1, per=timedelta(minutes=10))
    breaker = Breaker(failures=3, pause=timedelta(minutes=5))
    declare(database, Limit("slow", rate=slow), Limit("fused", key=str, breaker=breaker, share={"gold": 3}))
    declare(database, Limit("strict", key=str, concurrency=1, order="strict"))
    query(database, WAIT, ["a", "b"], [None, None])
    strict = "SET limit_key = 'strict ' || split_part(limit_key, ' ', 2)"
    parked = query(database, f"UPDATE pg_task {strict} RETURNING id")[0][0]
    query(database, "UPDATE pg_task SET wakeup_at = now(), error = 'boom' WHERE id = $1 RETURNING id", parked)
    query(database, PAUSE, ["fused down", "fused slow"], [3, 1])
    text = command("limit").out
    assert "1 per 10 min" in text
    assert all(words in text for words in ("3 failed: 5 min 0 s", "take turns (gold 3)", "strict order"))
    assert "1 with an open breaker; 1 throttled" in text
    keys = command("limit", "fused").out
    assert re.search(r"down .* breaker open\n", keys)
    assert re.search(r"slow .* throttled\n", keys)
    query(database, "UPDATE pg_task SET limit_key = 'strict a' RETURNING id")
    assert f"goes on after task {parked}, which is parked" in command("limit", "strict").out
    (shown,) = command("limit", "strict", "--json").objects
    assert [key["blocked_by"] for key in shown["keys"]] == [str(parked)]


@pytest.mark.parametrize(
    ("rate", "says"),
    [(10.0, "10/s"), (1000 / 60, "16.67/s"), (0.5, "30/min"), (1 / 600, "1 per 10 min"), (1 / 3600, "1 per 1 h"),
     (3 / 86_400, "1 per 8 h"), (1 / 604_800, "1 per 7 d"), (12_345.0, "12,345/s")],
)  # fmt: skip
def test_rates_are_in_a_unit_that_fits(rate: float, says: str) -> None:
    assert format_rate(rate) == says


def test_limit_changes_and_is_taken_back(database: str, command: Command) -> None:
    declare(database, host())
    assert command("limit", "host", "--concurrency", "4", "--rate", "3000/min", "--pause", "10m").code == 0
    assert query(database, RULES) == [(4, 50.0, 5.0, None, ["concurrency", "rate"], True)]
    declare(database, host(concurrency=9, cost=Rate(5, of="size")))
    assert query(database, RULES) == [(4, 50.0, 5.0, 5.0, ["concurrency", "rate"], True)], "a deploy changes the rest"
    command("limit", "host", "--resume", "--cost", "none")
    command("limit", "host", "--rate", "7/2s", "--burst", "3")
    assert query(database, RULES) == [(4, 3.5, 3.0, None, ["concurrency", "cost", "rate"], None)]
    command("limit", "host", "--reset")
    assert query(database, RULES) == [(9, 10.0, 1.0, 5.0, [], None)]
    actions = query(database, "SELECT action, filter, state FROM pg_task_actions ORDER BY id")
    assert actions[0] == ("limit", "host --concurrency 4 --rate 3000/min --pause 10m", "done")
    assert len(actions) == 4


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["limit", "hots"], "there is no limit hots; did you mean host?"),
        (["limit", "--rate", "1/s"], "name the limit to change"),
        (["limit", "host", "--rate", "fast"], "must be a number and a time, as 200/s"),
        (["limit", "host", "--rate", "0/s"], "must be a number greater than 0"),
        (["limit", "host", "--rate", "5/0s"], "must be a positive timedelta"),
        (["limit", "host", "--rate", "5/fortnight"], "expected a time span"),
        (["limit", "host", "--concurrency", "-1"], "must be a whole number, or none"),
        (["limit", "host", "--burst", "3"], "goes with --rate or with --cost"),
        (["limit", "host", "--pause", "soon"], "expected a time span"),
        (["limit", "host", "--pause", "1m", "--resume"], "either --pause or --resume"),
    ],
)
def test_wrong_words_change_no_limit(database: str, command: Command, words: list[str], says: str) -> None:
    declare(database, host())
    said = command(*words)
    assert (said.code, said.out) == (2, "")
    assert says in said.err
    assert query(database, RULES) == [(2, 10.0, 1.0, None, [], None)]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"name": "a b", "concurrency": 1}, "letters, digits"),
        ({"concurrency": 0}, "whole number, 1 or more"),
        ({"concurrency": True}, "whole number, 1 or more"),
        ({"rate": 5}, "must be a Rate"),
        ({"rate": Rate(5, of="tokens")}, "use cost="),
        ({"cost": Rate(5)}, "needs the field"),
        ({"key": "host", "concurrency": 1}, "must be a function"),
        ({"order": "strict", "concurrency": 2}, "needs concurrency=1"),
        ({"share": {"a": 0}}, "greater than 0"),
        ({"share": ["a"]}, "a weight for each key"),
        ({}, "limits nothing"),
    ],
)
def test_limit_that_means_nothing_is_refused(arguments: dict[str, object], says: str) -> None:
    with pytest.raises(DefinitionError, match=says):
        Limit(**{"name": "host", **arguments})  # type: ignore[arg-type]


def test_rate_and_breaker_are_checked() -> None:
    for wrong in ({"count": 0}, {"count": float("nan")}, {"burst": 0.5}, {"per": 1}, {"of": "a b"}):
        with pytest.raises(DefinitionError):
            Rate(**{"count": 1, **wrong})  # type: ignore[arg-type]
    with pytest.raises(DefinitionError, match="failures"):
        Breaker(0, Rate(1).per)
