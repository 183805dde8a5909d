"""`pgtask groups`, and `--group` of the commands for tasks."""

from __future__ import annotations

from typing import Any

import pytest
from fix_database import run
from fleet import Rows, burst
from grouping import Break, Fetch, Report

from pgtask import Client, Group, Task


def start(dsn: str, name: str, *members: Task, **options: Any) -> None:
    async def main() -> None:
        async with Client(dsn) as client:
            await client.start(Group(name, **options), members)

    run(main())


def test_groups_lists_watches_and_refuses(command: Any, database: str, rows: Rows) -> None:
    assert command("groups") == (0, "", "pgtask: no groups\n")
    start(database, "crawl one", Fetch("a"), Fetch("b"), Break(), results=True, on_parked="go on")
    start(database, "other")
    burst(database, app="grouping:app", code=1)
    code, out, _ = command("groups")
    assert code == 0
    first, other, crawl = out.splitlines()
    assert first.split() == ["%", "eta", "done", "total", "parked", "cancelled", "rate", "state", "started", "group"]
    assert crawl.split()[:2] == ["66.7", "%"]
    assert crawl.endswith("crawl one")
    assert other.split()[:4] == ["100.0", "%", "0", "0"]
    (shown,) = command("groups", "crawl one", "--json").objects
    assert (shown["state"], shown["done"], shown["parked"], shown["left"]) == ("ended", 2, 1, 0)
    assert command("groups", "crawl one", "--watch").code == 0, "it has ended"
    assert "there is no group 'no'" in command("groups", "no").err
    assert command("groups", "--cancel").code == 2
    assert command("groups", "other", "--cancel").err == "pgtask: the group other has ended before\n"


def test_group_is_a_filter_of_the_commands_for_tasks(command: Any, database: str, rows: Rows) -> None:
    start(database, "a", *(Fetch(f"{number}") for number in range(30)), Break())
    start(database, "b", *(Fetch(f"{number}") for number in range(5)), then=Report("b"))
    rows("UPDATE pg_task SET error = 'broken 17' WHERE step LIKE '%Break%'")
    assert len(command("list", "--group", "a", "--json", "-n", "100").objects) == 31
    assert command("parked", "--group", "b", "--json").objects == []
    assert [one["tasks"] for one in command("parked", "--group", "a", "--json").objects] == [1]
    assert "pgtask retry --group a --step Crawl.Break " in command("parked", "--group", "a").out
    assert command("move", "--group", "a", "--queue", "slow", "--dry-run").out == "31 tasks would be moved\n"
    assert command("move", "--group", "a", "--queue", "slow").out == "31 tasks moved\n"
    assert command("retry", "--group", "a", "--error", "broken%").out == "1 task made due\n"
    assert command("cancel", "--group", "a", "--step", "Break").out == "1 task cancelled\n"
    assert rows.value("SELECT count(*) FROM pg_task WHERE queue = 'slow'") == 30
    assert rows.value("SELECT filter FROM pg_task_actions ORDER BY id DESC LIMIT 1") == "--step Break --group a"
    assert command("groups", "b", "--cancel", "--no-then").code == 0
    assert rows.value("SELECT count(*) FROM pg_task") == 30
    assert command("prune", "--older-than", "0", "--groups").out == "1 group removed\n"
    assert rows.value("SELECT count(*) FROM pg_task_groups") == 1


@pytest.mark.parametrize("words", [("retry", "--group", "a", "--key", "k", "--task", "T")])
def test_group_and_key_exclude_each_other(command: Any, words: tuple[str, ...]) -> None:
    assert "exclude each other" in command(*words).err
