"""The values that user code makes: outcomes and policies, and what is refused when they are made."""

from __future__ import annotations

import asyncio
import copy
import pickle
from datetime import UTC, datetime, timedelta
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from trees import Closes

from pgtask import DefinitionError, Done, Enqueue, EnqueueError, Fail, Next, Policy, Transient
from pgtask._delays import MAX_DELAY
from pgtask.errors import OutcomeError
from pgtask.policy import DEFAULT_QUEUE, check_priority, check_queue
from pgtask.testing import MemoryClient

SECOND = timedelta(seconds=1)
NOW = datetime(2026, 1, 1, tzinfo=UTC)

# --- outcomes -----------------------------------------------------------------------------------------------------


def test_outcomes_are_values() -> None:
    assert Next(1) == Next(1, after=None) != Next(1, after=SECOND)
    assert Done() == Done()
    assert Fail("a") == Fail("a") != Fail("b")
    assert Next(5, SECOND).after == SECOND
    for outcome in (Next(1, SECOND), Done(), Fail("a")):
        assert copy.deepcopy(outcome) == outcome == pickle.loads(pickle.dumps(outcome))
        assert len({outcome, copy.copy(outcome)}) == 1


@pytest.mark.parametrize(("outcome", "name"), [(Next(1), "step"), (Next(1), "after"), (Fail("a"), "reason")])
def test_outcome_cannot_be_changed(outcome: Any, name: str) -> None:
    with pytest.raises(AttributeError):
        setattr(outcome, name, None)


def test_outcome_has_a_readable_repr() -> None:
    assert repr(Next(1, after=SECOND)) == "Next(step=1, after=datetime.timedelta(seconds=1))"
    assert repr(Done()) == "Done()"
    assert repr(Fail("enough")) == "Fail(reason='enough')"


@given(st.timedeltas(max_value=timedelta(microseconds=-1)))
def test_negative_delay_is_refused(after: timedelta) -> None:
    with pytest.raises(OutcomeError, match=r"^Next\(after=.*\): use a timedelta, zero or more$"):
        Next(1, after=after)


@given(st.none() | st.timedeltas(min_value=timedelta(0), max_value=MAX_DELAY))
def test_any_other_delay_is_kept(after: timedelta | None) -> None:
    assert Next(1, after=after).after == after


def test_delay_beyond_a_row_is_refused() -> None:
    too_long = MAX_DELAY + timedelta(microseconds=1)
    for refused in (too_long, timedelta.max):
        with pytest.raises(OutcomeError, match=r"^Next\(after=.*\): use a timedelta, .* at most 365000 days$"):
            Next(1, after=refused)


@pytest.mark.parametrize("after", [timedelta.max, -SECOND, 5, float("nan"), float("inf"), "1s"])
def test_delay_of_transient_fits_a_row(after: Any) -> None:
    with pytest.raises(ValueError, match=r"^Transient\(retry_after=.*\) must be a timedelta, zero or more") as caught:
        Transient("x", retry_after=after)
    assert repr(after) in str(caught.value)
    assert Transient("x", retry_after=MAX_DELAY).retry_after == MAX_DELAY


@pytest.mark.parametrize("after", [5, 0.5, "1s"])
def test_delay_of_another_type_is_refused(after: Any) -> None:
    with pytest.raises((OutcomeError, TypeError)):
        Next(1, after=after)


def test_outcome_takes_nothing_else() -> None:
    for call in (
        lambda: Next(),  # type: ignore[call-arg]
        lambda: Next(1, delay=SECOND),  # type: ignore[call-arg]
        lambda: Done(1, 2),  # type: ignore[call-arg, arg-type]
        lambda: Done(1, [Closes("a")]),  # type: ignore[call-arg]
        lambda: Fail(),  # type: ignore[call-arg]
    ):
        with pytest.raises(TypeError):
            call()


def test_new_tasks_are_values() -> None:
    step = Closes("a")
    assert Done(enqueue=[step]) == Done(enqueue=[step]) != Done()
    assert repr(Next(1, enqueue=[step])) == "Next(step=1, enqueue=[Closes(path='a')])"
    full = Enqueue(step, after=SECOND, queue="q", priority=1, key="k")
    assert copy.deepcopy(full) == full == pickle.loads(pickle.dumps(full))
    assert repr(Enqueue(step, key="k")) == "Enqueue(step=Closes(path='a'), key='k')"


WRONG_PLACES: dict[str, tuple[dict[str, Any], str]] = {
    "both": ({"after": SECOND, "at": NOW}, "give either after= or at=, not both"),
    "negative": ({"after": -SECOND}, "after="),
    "no timedelta": ({"after": 5}, "after=5 must be a timedelta, zero or more"),
    "too long": ({"after": timedelta.max}, "after="),
    "no zone": ({"at": NOW.replace(tzinfo=None)}, "at=datetime.datetime(2026, 1, 1, 0, 0) has no time zone"),
    "no datetime": ({"at": "now"}, "at='now' must be a datetime"),
    "queue": ({"queue": "a,b"}, "queue 'a,b' must be a printable string"),
    "priority": ({"priority": 1.5}, "priority 1.5 must be a whole number"),
    "empty key": ({"key": ""}, "key '' must be 1 to 512 characters without NUL"),
    "long key": ({"key": "x" * 513}, "key 'xxx"),
    "number as key": ({"key": 5}, "key=5 must be a string, not of type int"),
}


@pytest.mark.parametrize("name", WRONG_PLACES)
def test_enqueue_refuses_what_a_client_refuses(name: str) -> None:
    wrong, says = WRONG_PLACES[name]
    with pytest.raises(EnqueueError) as refused:
        Enqueue(Closes("a"), **wrong)
    assert str(refused.value).startswith(says)

    async def by_client() -> None:
        client = MemoryClient()
        options = {name: value for name, value in wrong.items() if name not in ("after", "at")}
        if "at" in wrong:
            await client.schedule(Closes("a"), wrong["at"], **options)
        elif "after" in wrong:
            await client.delay(Closes("a"), wrong["after"], **options)
        else:
            await client.enqueue(Closes("a"), **options)

    if name != "both":
        with pytest.raises(EnqueueError) as same:
            asyncio.run(by_client())
        assert str(same.value).replace("delay ", "after=") == str(refused.value)


# --- policy -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["on_conflict", "on_parked", "debounce", "ceiling", "expires"])
def test_argument_of_a_client_is_refused_in_an_item(name: str) -> None:
    for value in ("replace", SECOND, timedelta(0)):
        with pytest.raises(EnqueueError, match=rf"Enqueue\({name}=...\): an item has no {name}, .*ctx.client.enqueue"):
            Enqueue(Closes("a"), **{name: value})  # type: ignore[arg-type]


def test_default_policy_is_as_documented() -> None:
    policy = Policy()
    assert (policy.retry_limit, policy.retry_delay, policy.backoff) == (0, SECOND, "constant")
    assert (policy.max_delay, policy.jitter, policy.timeout) == (timedelta(hours=1), 0.0, None)
    assert (policy.queue, policy.priority) == (DEFAULT_QUEUE, 0) == ("default", 0)
    assert policy == Policy()


def test_policy_cannot_be_changed_and_takes_names_only() -> None:
    with pytest.raises(AttributeError):
        Policy().queue = "other"  # type: ignore[misc]
    with pytest.raises(TypeError):
        Policy(5)  # type: ignore[call-arg]
    with pytest.raises(TypeError):
        Policy(retries=5)  # type: ignore[call-arg]


WRONG: list[tuple[str, Any, str]] = [
    ("retry_limit", -1, "must be a whole number, 0 or more"),
    ("retry_limit", 1.5, "must be a whole number, 0 or more"),
    ("retry_limit", "5", "must be a whole number, 0 or more"),
    ("retry_limit", True, "must be a whole number, 0 or more"),
    ("retry_limit", None, "must be a whole number, 0 or more"),
    ("retry_delay", 1, "must be a timedelta, zero or more"),
    ("retry_delay", -SECOND, "must be a timedelta, zero or more"),
    ("retry_delay", None, "must be a timedelta, zero or more"),
    ("retry_delay", timedelta.max, "must be a timedelta, zero or more, at most 365000 days"),
    ("max_delay", 1, "must be a timedelta, zero or more"),
    ("max_delay", -SECOND, "must be a timedelta, zero or more"),
    ("backoff", "linear", 'must be "constant" or "exponential"'),
    ("backoff", None, 'must be "constant" or "exponential"'),
    ("jitter", -0.1, "must be a number from 0 to 1"),
    ("jitter", 1.1, "must be a number from 0 to 1"),
    ("jitter", float("nan"), "must be a number from 0 to 1"),
    ("jitter", "0.5", "must be a number from 0 to 1"),
    ("jitter", True, "must be a number from 0 to 1"),
    ("timeout", timedelta(0), "must be a positive timedelta, or None"),
    ("timeout", -SECOND, "must be a positive timedelta, or None"),
    ("timeout", timedelta.max, "must be a timedelta, zero or more, at most 365000 days"),
    ("timeout", 5, "must be a positive timedelta, or None"),
    ("queue", "", "must be a printable string of 1 to 255 characters without a comma"),
    ("queue", "x" * 256, "must be a printable string of 1 to 255 characters without a comma"),
    ("queue", "a\nb", "must be a printable string of 1 to 255 characters without a comma"),
    ("queue", "a\0b", "must be a printable string of 1 to 255 characters without a comma"),
    ("queue", "a\ud800", "must be a printable string of 1 to 255 characters without a comma"),
    ("queue", "a,b", "must be a printable string of 1 to 255 characters without a comma"),
    ("queue", 5, "must be a printable string of 1 to 255 characters without a comma"),
    ("priority", 32768, "must be a whole number from -32768 to 32767"),
    ("priority", -32769, "must be a whole number from -32768 to 32767"),
    ("priority", 1.0, "must be a whole number from -32768 to 32767"),
    ("priority", False, "must be a whole number from -32768 to 32767"),
]


@pytest.mark.parametrize(("name", "value", "remedy"), WRONG, ids=lambda value: repr(value)[:20])
def test_wrong_argument_is_named_with_its_rule(name: str, value: Any, remedy: str) -> None:
    with pytest.raises(DefinitionError) as caught:
        Policy(**{name: value})
    message = str(caught.value)
    assert name in message
    assert repr(value) in message
    assert message.endswith(remedy)
    assert "\n" not in message


@pytest.mark.parametrize(
    "right",
    [
        {"retry_limit": 10**9},
        {"retry_delay": timedelta(0)},
        {"max_delay": timedelta(0)},
        {"jitter": 0},
        {"jitter": 1},
        {"timeout": timedelta(microseconds=1)},
        {"queue": "Überweisungen & Grüße ☃"},
        {"queue": "x" * 255},
        {"priority": -32768},
        {"priority": 32767},
    ],
    ids=str,
)
def test_bounds_themselves_are_right(right: dict[str, Any]) -> None:
    assert msgspec.structs.asdict(Policy(**right)).items() >= right.items()


@given(st.text(min_size=1, max_size=300))
def test_queue_that_is_accepted_can_be_stored_and_shown(queue: str) -> None:
    try:
        assert check_queue(queue) == queue
    except ValueError:
        assert len(queue) > 255 or not queue.isprintable() or "," in queue
    else:
        assert "\0" not in queue
        assert queue.encode()


@given(st.integers())
def test_priority_that_is_accepted_fits_the_column(priority: int) -> None:
    try:
        assert check_priority(priority) == priority
    except ValueError:
        assert priority.bit_length() >= 16
    else:
        assert priority.to_bytes(2, "big", signed=True)


# --- the delay before a retry -------------------------------------------------------------------------------------


def test_constant_delay_stays() -> None:
    policy = Policy(retry_delay=timedelta(seconds=2.5), max_delay=SECOND)
    assert [policy.delay_before_retry(tried) for tried in (1, 2, 100)] == [2.5, 2.5, 2.5]


def test_exponential_delay_doubles_up_to_its_ceiling() -> None:
    policy = Policy(retry_delay=2 * SECOND, backoff="exponential", max_delay=10 * SECOND)
    assert [policy.delay_before_retry(tried) for tried in range(1, 6)] == [2, 4, 8, 10, 10]


@given(
    st.timedeltas(min_value=timedelta(0), max_value=MAX_DELAY),
    st.timedeltas(min_value=timedelta(0)),
    st.sampled_from(["constant", "exponential"]),
    st.floats(0, 1),
    st.integers(1, 2**31),
)
def test_any_delay_is_within_its_bounds(
    retry_delay: timedelta, max_delay: timedelta, backoff: Any, jitter: float, tried: int
) -> None:
    policy = Policy(retry_delay=retry_delay, max_delay=max_delay, backoff=backoff, jitter=jitter)
    seconds = retry_delay.total_seconds()
    if backoff == "exponential":
        doubled = seconds * 2 ** min(tried - 1, 200) if seconds else 0.0
        seconds = min(doubled, max_delay.total_seconds())
    delay = policy.delay_before_retry(tried)
    assert seconds * (1 - jitter) * 0.999999 <= delay <= seconds * (1 + jitter) * 1.000001


@given(st.floats(0, 1, exclude_min=True))
def test_jitter_never_exceeds_the_ceiling(jitter: float) -> None:
    """`max_delay` is documented as a ceiling: never above it."""
    policy = Policy(retry_delay=SECOND, backoff="exponential", max_delay=10 * SECOND, jitter=jitter)
    assert max(policy.delay_before_retry(20) for _ in range(50)) <= 10


def test_jitter_spreads_delays() -> None:
    policy = Policy(retry_delay=10 * SECOND, jitter=0.25)
    delays = [policy.delay_before_retry(1) for _ in range(500)]
    assert 7.5 <= min(delays) < 8.5
    assert 11.5 < max(delays) <= 12.5
