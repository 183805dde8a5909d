"""The delays of a backoff."""

from __future__ import annotations

from pgtask._backoff import Backoff, exponential_delay


def test_backoff_doubles_to_its_maximum_until_it_is_reset() -> None:
    backoff = Backoff(0.5, 3.0)
    assert backoff.is_reset
    assert [backoff.next() for _ in range(5)] == [0.5, 1.0, 2.0, 3.0, 3.0]
    assert not backoff.is_reset
    backoff.reset()
    assert backoff.is_reset
    assert backoff.next() == 0.5


def test_backoff_of_equal_bounds_stays_constant() -> None:
    backoff = Backoff(1.0, 1.0)
    assert [backoff.next() for _ in range(3)] == [1.0, 1.0, 1.0]


def test_exponential_delay_of_many_tries_does_not_overflow() -> None:
    assert exponential_delay(0.1, 30.0, 1_000_000) == 30.0
    assert exponential_delay(0.0, 30.0, 1_000_000) == 0.0
