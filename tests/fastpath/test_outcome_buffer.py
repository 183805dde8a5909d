"""The buffer of the flush, compared with the oracle."""

from __future__ import annotations

from typing import Any
from uuid import UUID, uuid4

import reference
from hypothesis import given
from hypothesis import strategies as st

from pgtask._fastpath import Leases, Outcomes

TEXTS = st.none() | st.text(max_size=5)
OUTCOMES = st.lists(
    st.one_of(
        st.tuples(st.just("done")),
        st.tuples(st.just("continued"), st.text(max_size=5)),
        st.tuples(
            st.just("rescheduled"),
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


def filled(outcomes: list[tuple[Any, ...]], ids: list[UUID]) -> tuple[Outcomes, list[reference.BufferedOutcome]]:
    buffer = Outcomes()
    entries = []
    for (kind, *columns), id in zip(outcomes, ids, strict=False):
        ((lease,), _) = Leases().add_claimed([(id, "", 0, 1, None)], uuid4(), 0.0)
        match kind:
            case "done":
                buffer.add_done(lease)
                entries.append(reference.BufferedOutcome("done", lease.id, lease.token))
            case "continued":
                buffer.add_continued(lease, *columns)
                entries.append(reference.BufferedOutcome("continued", lease.id, lease.token, *columns))
            case "rescheduled":
                buffer.add_rescheduled(lease, *columns)
                entries.append(reference.BufferedOutcome("rescheduled", lease.id, lease.token, *columns))
    entries.sort(key=lambda entry: ["done", "continued", "rescheduled"].index(entry.kind))
    return buffer, entries


IDS = st.lists(st.sampled_from(POOL), min_size=12, max_size=12)


@given(OUTCOMES, IDS)
def test_buffer_holds_added_outcomes(outcomes: list[tuple[Any, ...]], ids: list[UUID]) -> None:
    buffer, entries = filled(outcomes, ids)
    assert buffer.parameters() == reference.parameters(entries)
    assert len(buffer) == len(entries)
    assert [lease.id for lease in buffer.leases()] == [entry.id for entry in entries]
    assert [lease.token for lease in buffer.leases()] == [entry.token for entry in entries]


@given(OUTCOMES, IDS)
def test_halves_hold_each_outcome_once(outcomes: list[tuple[Any, ...]], ids: list[UUID]) -> None:
    buffer, entries = filled(outcomes, ids)
    before = buffer.parameters()
    first, second = buffer.halves()
    tokens = {lease.token for lease in first.leases()}
    assert first.parameters() == reference.parameters(entry for entry in entries if entry.token in tokens)
    assert second.parameters() == reference.parameters(entry for entry in entries if entry.token not in tokens)
    assert {*first.leases(), *second.leases()} == set(buffer.leases())
    assert buffer.parameters() == before
    if len(entries) > 1:
        assert len(first) < len(buffer) > len(second)  # so that bisecting ends


@given(OUTCOMES, IDS, st.sets(st.sampled_from(POOL)))
def test_divide_splits_outcomes_by_task(outcomes: list[tuple[Any, ...]], ids: list[UUID], chosen: set[UUID]) -> None:
    buffer, entries = filled(outcomes, ids)
    first, second = buffer.divide(chosen)
    among = [entry for entry in entries if entry.id in chosen]
    others = [entry for entry in entries if entry.id not in chosen]
    assert (first.parameters(), second.parameters()) == (reference.parameters(among), reference.parameters(others))
    assert {*first.leases(), *second.leases()} == set(buffer.leases())


@given(OUTCOMES, IDS)
def test_size_counts_the_texts(outcomes: list[tuple[Any, ...]], ids: list[UUID]) -> None:
    buffer, entries = filled(outcomes, ids)
    assert buffer.size == sum(len(entry.step or "") + len(entry.error or "") for entry in entries)
