"""The buffer of the flush, compared with the oracle."""

from __future__ import annotations

from dataclasses import astuple, replace
from typing import Any
from uuid import UUID, uuid4

import reference
from hypothesis import given
from hypothesis import strategies as st
from step_programs import Scene

from pgtask._fastpath import Codec, Leases, NewTask, Outcomes

TEXTS = st.none() | st.text(max_size=5)
KEYS = st.none() | st.sampled_from("abc")
NEW = st.lists(
    st.builds(
        reference.NewTask,
        st.text(max_size=5),
        st.none(),
        st.none() | st.floats(0, 9),
        st.text(max_size=5),
        st.integers(-9, 9),
        KEYS,
    ),
    max_size=3,
)
OUTCOMES = st.lists(
    st.one_of(
        st.tuples(st.just("done"), NEW),
        st.tuples(st.just("archived"), NEW),
        st.tuples(st.just("continued"), NEW, st.text(max_size=5)),
        st.tuples(
            st.just("rescheduled"),
            NEW,
            TEXTS,
            st.none() | st.integers(0, 9),
            TEXTS,
            st.floats(0, 9),
            TEXTS,
            st.none() | st.integers(-9, 9),
            st.none() | st.integers(1, 9),
        ),
    ),
    max_size=12,
)


POOL = [UUID(int=number) for number in range(8)]  # a task that was lost and claimed again may have two outcomes


ORDER = ["done", "archived", "continued", "rescheduled"]
CODEC = Codec(Scene, "Play", "Scene", False)


def filled(outcomes: list[tuple[Any, ...]], ids: list[UUID]) -> tuple[Outcomes, list[reference.BufferedOutcome]]:
    buffer = Outcomes()
    entries = []
    for (kind, new, *columns), id in zip(outcomes, ids, strict=False):
        ((lease,), _) = Leases().add_claimed([(id, "", 0, 1, None)], uuid4(), 0.0)
        getattr(buffer, f"add_{kind}")(lease, *columns)
        buffer.add_new_tasks(lease, [NewTask(CODEC, uuid4(), *astuple(task)) for task in new])
        entries.append(replace(reference.BufferedOutcome(kind, lease.id, lease.token, *columns), new=tuple(new)))
    entries.sort(key=lambda entry: ORDER.index(entry.kind))
    return buffer, entries


def kept(buffer: Outcomes) -> list[reference.BufferedOutcome]:
    """What a buffer holds, in the order of its leases."""
    held: list[tuple[Any, ...]] = [
        *(("done", lease) for lease in buffer.done),
        *(("archived", lease) for lease in buffer.archived),
        *(("continued", *row) for row in buffer.continued),
        *(("rescheduled", *row) for row in buffer.rescheduled),
    ]
    found = []
    for kind, lease, *columns in held:
        new = tuple(reference.NewTask(*task[2:-1]) for task in buffer.new_tasks.get(lease, ()))
        found.append(replace(reference.BufferedOutcome(kind, lease.id, lease.token, *columns), new=new))
    assert len(buffer.new_tasks) == len([entry for entry in found if entry.new]), "new tasks without their outcome"
    return found


IDS = st.lists(st.sampled_from(POOL), min_size=12, max_size=12)


@given(OUTCOMES, IDS)
def test_buffer_holds_added_outcomes(outcomes: list[tuple[Any, ...]], ids: list[UUID]) -> None:
    buffer, entries = filled(outcomes, ids)
    assert kept(buffer) == entries
    assert len(buffer) == len(entries)
    assert buffer.rows == len(entries) + sum(len(entry.new) for entry in entries)
    assert [lease.id for lease in buffer.leases()] == [entry.id for entry in entries]
    assert [lease.token for lease in buffer.leases()] == [entry.token for entry in entries]


@given(OUTCOMES, IDS)
def test_parts_have_a_statement_each(outcomes: list[tuple[Any, ...]], ids: list[UUID]) -> None:
    buffer, entries = filled(outcomes, ids)
    parts = buffer.parts()
    statements = [part.statement for part in parts]
    assert len(statements) == len(set(statements))
    for part in parts:
        wanted = [
            entry
            for entry in entries
            if (entry.kind == "archived") == part.statement.startswith("archive")
            and bool(entry.new) == part.statement.endswith("_enqueue")
        ]
        assert kept(part) == wanted
        assert wanted, "an empty statement"
        flush = [replace(entry, kind="done") if entry.kind == "archived" else entry for entry in wanted]
        head = reference.parameters(flush)
        found = part.parameters()
        if part.statement == "archive":
            assert found == head[:2]
            continue
        assert found[:16] == head
        parents, made, *columns = found[16:] or [[]] * 8
        assert [parents, *columns] == reference.new_parameters(wanted)
        assert len(set(made)) == len(parents)
    assert sum(map(len, parts)) == len(entries)


@given(OUTCOMES, IDS)
def test_halves_hold_each_outcome_once(outcomes: list[tuple[Any, ...]], ids: list[UUID]) -> None:
    buffer, entries = filled(outcomes, ids)
    first, second = buffer.halves()
    assert sorted(map(repr, kept(first) + kept(second))) == sorted(map(repr, entries))
    assert kept(buffer) == entries
    if len(entries) > 1:
        assert len(first) < len(buffer) > len(second)  # so that bisecting ends


@given(OUTCOMES, IDS, st.sets(st.sampled_from(POOL)))
def test_divide_splits_outcomes_by_task(outcomes: list[tuple[Any, ...]], ids: list[UUID], chosen: set[UUID]) -> None:
    buffer, entries = filled(outcomes, ids)
    first, second = buffer.divide(chosen)
    assert kept(first) == [entry for entry in entries if entry.id in chosen]
    assert kept(second) == [entry for entry in entries if entry.id not in chosen]
    assert {*first.leases(), *second.leases()} == set(buffer.leases())


@given(OUTCOMES, IDS)
def test_size_counts_the_texts(outcomes: list[tuple[Any, ...]], ids: list[UUID]) -> None:
    buffer, entries = filled(outcomes, ids)
    texts = [text or "" for entry in entries for text in (entry.step, entry.error)]
    texts += [text or "" for entry in entries for task in entry.new for text in (task.step, task.key)]
    assert buffer.size == sum(map(len, texts))
