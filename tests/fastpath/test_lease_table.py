"""The table of leases, compared with the oracle."""

from __future__ import annotations

from typing import Any
from uuid import UUID, uuid4

import reference
from hypothesis import given
from hypothesis import strategies as st

from pgtask._fastpath import Leases, TaskLease

ACTIONS = st.lists(
    st.one_of(
        st.tuples(st.just("claim"), st.lists(st.integers(0, 7), max_size=4, unique=True), st.floats(0, 9)),
        st.tuples(st.just("remove"), st.integers(0, 30)),
        st.tuples(st.just("renew"), st.lists(st.integers(0, 30), max_size=4), st.floats(0, 9)),
        st.tuples(st.just("due"), st.floats(0, 9)),
    ),
    max_size=30,
)


@given(ACTIONS)
def test_lease_table_behaves_as_dict_by_task(actions: list[tuple[Any, ...]]) -> None:
    table, model = Leases(), reference.Leases()
    ids = [uuid4() for _ in range(8)]
    known: list[tuple[TaskLease, reference.HeldLease]] = []  # all leases, removed ones too

    def pairs(leases: list[TaskLease]) -> list[tuple[UUID, UUID]]:
        return [(lease.id, lease.token) for lease in leases]

    def model_pairs(held: list[reference.HeldLease]) -> list[tuple[UUID, UUID]]:
        return [(one.id, one.token) for one in held]

    for action, *arguments in actions:
        match action:
            case "claim":
                numbers, sent = arguments
                token = uuid4()
                rows = [(ids[number], f'"{number}"', number, 1, None) for number in numbers]
                leases, displaced = table.add_claimed(rows, token, sent)
                held, model_displaced = model.add_claimed((ids[number] for number in numbers), token, sent)
                assert pairs(leases) == model_pairs(held)
                assert [lease.tried for lease in leases] == numbers
                assert pairs(displaced) == model_pairs(model_displaced)
                known += zip(leases, held, strict=True)
            case "remove" if known:
                lease, one = known[arguments[0] % len(known)]
                table.remove(lease)
                model.remove(one)
            case "renew" if known:
                chosen = [known[number % len(known)] for number in arguments[0]]
                table.mark_renewed([lease for lease, _ in chosen], arguments[1])
                for _, one in chosen:
                    one.renewed = arguments[1]
            case "due":
                assert pairs(table.renewed_before(arguments[0])) == model_pairs(model.renewed_before(arguments[0]))
        assert len(table) == len(model.by_id)
        for id in ids:
            mine, other = table.get(id), model.by_id.get(id)
            assert (mine is None) == (other is None)
            assert mine is None or other is None or (mine, other) in known
        assert pairs(table.list_open()) == model_pairs(list(model.by_id.values()))
    assert table.renewed_before(float("inf")) == table.list_open()


def test_new_lease_is_open_and_not_decoded() -> None:
    id, token = uuid4(), uuid4()
    ((lease,), _) = Leases().add_claimed([(id, '{"Kit":{"Unit":null}}', 2, 3, 700)], token, 5.0)
    assert (lease.id, lease.token, lease.tried, lease.claims, lease.size) == (id, token, 2, 3, 700)
    assert lease.entry is None
    assert lease.is_open
    assert lease.label == "(not decoded)"
    assert str(id) in repr(lease)
    assert '"Kit"' not in repr(lease)  # payloads are never logged
