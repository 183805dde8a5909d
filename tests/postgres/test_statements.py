"""The texts of the statements: rules that several of them share are the same in each."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from pgtask._postgres import store
from pgtask._postgres.store import statement

SQL = Path(store.__file__).parent / "sql"
NAMES = sorted(path.relative_to(SQL).with_suffix("").as_posix() for path in SQL.rglob("*.sql"))
UPDATE = re.compile(r"^ *UPDATE pg_task(?: AS task)?\n *SET (.*?)\n *(?:FROM|WHERE)\b", re.MULTILINE | re.DOTALL)


def sent(name: str) -> list[str]:
    """The lines of a statement without its comments."""
    return [line for line in statement(name).splitlines() if not line.startswith("--")]


@pytest.mark.parametrize("name", NAMES)
def test_statement_contains_what_it_includes(name: str) -> None:
    assert not re.search("^ *-- include:", statement(name), re.MULTILINE)


@pytest.mark.parametrize("name", NAMES)
def test_statement_that_clears_a_lease_clears_all_of_it(name: str) -> None:
    """The token, its end, and the count of claims, which says whether the task is a suspect."""
    for columns in UPDATE.findall(statement(name)):
        cleared = {column for column in ("locked_by", "lock_expires_at") if f"{column} = NULL" in columns}
        if cleared:
            assert cleared == {"locked_by", "lock_expires_at"}
            assert re.search(r"\bclaims = ", columns)


def test_statements_that_clear_leases_are_found() -> None:
    clearing = {name for name in NAMES if any("locked_by = NULL" in found for found in UPDATE.findall(statement(name)))}
    assert clearing == {name for name in NAMES if "locked_by = NULL" in statement(name)}
    assert {"flush", "release", "claim_recover", "expire", "retry", "journal/end", "journal/suspend"} <= clearing


def test_claim_unsuspected_is_claim_with_one_condition_more() -> None:
    more = list(sent("claim_unsuspected"))
    more.remove("      AND claims = 0")
    assert more == sent("claim")


def test_claims_end_in_the_same_way() -> None:
    shared = sent("shared/claim_picked")
    for name in ("claim", "claim_unsuspected", "claim_known"):
        assert sent(name)[-len(shared) :] == shared
