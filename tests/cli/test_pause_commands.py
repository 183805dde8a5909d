"""`pgtask pause` and `pgtask resume`, and what `pgtask stats` says of pauses."""

from __future__ import annotations

import json

import pytest
from fix_commands import Command, insert, query

PAUSES = "SELECT kind, name, reason FROM pg_task_pauses ORDER BY kind, name"


def test_pause_lists_and_resumes_queues_tasks_and_steps(database: str, command: Command) -> None:
    assert command("pause") == (0, "nothing is paused\n", "")
    said = command("pause", "reports", "--task", "Crawl", "--step", "Order.Charge", "--reason", "the bank is down")
    assert said == (0, "queue reports is paused\ntask Crawl is paused\nstep Order.Charge is paused\n", "")
    assert query(database, PAUSES) == [
        ("queue", "reports", "the bank is down"),
        ("step", "Order.Charge", "the bank is down"),
        ("task", "Crawl", "the bank is down"),
    ]
    again = command("pause", "reports", "-q", "mail")
    assert again.out.startswith("queue reports was paused ")
    assert again.out.endswith("queue mail is paused\n")
    listed = command("pause").out
    assert all(name in listed for name in ("queue reports", "step Order.Charge", "task Crawl", "the bank is down"))
    assert [one["name"] for one in command("pause", "--json").objects] == ["mail", "reports", "Order.Charge", "Crawl"]
    assert command("resume", "reports", "--step", "Order.Charge") == (
        0,
        "queue reports goes on\nstep Order.Charge goes on\n",
        "",
    )
    assert command("resume", "--all") == (0, "queue mail goes on\ntask Crawl goes on\n", "")
    assert command("resume", "--all") == (0, "nothing was paused\n", "")


def test_stats_show_what_is_paused(database: str, command: Command) -> None:
    command("pause", "--task", "Crawl", "--reason", "too\nfast")
    text = command("stats").out
    assert "paused  task Crawl, " in text
    assert "too\\nfast" in text
    assert json.loads(command("stats", "--json").out)["pauses"][0]["name"] == "Crawl"


def test_key_of_a_task_is_paused_alone(database: str, command: Command) -> None:
    words = ("--task", "Crawl", "--key", "a b")
    assert command("pause", *words) == (0, "key Crawl/a b is paused\n", "")
    assert query(database, PAUSES) == [("key", "Crawl/a b", None)]
    assert command("resume", *words) == (0, "key Crawl/a b goes on\n", "")
    assert query(database, PAUSES) == []


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["pause", "--key", "k"], "--key k: a key belongs to a task or workflow; name this one by --task"),
        (["pause", "--key", "k", "--task", "A", "--task", "B"], "name this one by --task"),
        (["pause", "--key", "", "--task", "A"], "must be 1 to 512 characters"),
        (["pause", "--task", "Order.Charge"], "for a step: --step Task.Step"),
        (["pause", "--step", "Charge"], "must be the name of a task and its step"),
        (["pause", "--step", "A."], "must be the name of a task and its step"),
        (["pause", "a\x00b"], "queue"),
        (["pause", "--reason", "x"], "name a queue, a --task, a --step or a --key"),
        (["resume"], "name a paused queue, --task or --step, or the id of a run"),
        (["resume", "--all", "reports"], "leave the names out"),
        (["resume", "reports"], "no queue of this name is paused"),
    ],
)
def test_wrong_words_are_refused(database: str, command: Command, words: list[str], says: str) -> None:
    said = command(*words)
    assert (said.code, said.out) == (2, "")
    assert says in said.err
    assert query(database, PAUSES) == []


def test_resume_names_what_is_not_paused(database: str, command: Command) -> None:
    command("pause", "a")
    said = command("resume", "a", "--task", "Crawl")
    assert said == (1, "queue a goes on\n", "pgtask: task Crawl is not paused\n")


def test_word_that_is_a_paused_queue_is_no_id(database: str, command: Command) -> None:
    """Also if it has the form of one."""
    insert(database)
    command("pause", "deadbeef")
    assert command("resume", "deadbeef").out == "queue deadbeef goes on\n"
    assert "there is no such run" in command("resume", "deadbeef").err


def test_names_are_quoted_for_no_terminal(database: str, command: Command) -> None:
    command("pause", "--task", "Évil\x1b[31m")
    for words in (["pause"], ["stats"]):
        assert "\x1b[31m" not in command(*words).out


def test_pauses_say_by_whom(database: str, command: Command) -> None:
    command("pause", "a")
    assert "@" in command("pause", "--json").objects[0]["paused_by"]
