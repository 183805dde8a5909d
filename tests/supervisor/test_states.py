"""The state table of a slot, without a fork."""

from __future__ import annotations

import pytest

from pgtask._supervisor.states import (
    BOOT_TRIES,
    HEALTHY_AFTER,
    MAX_BACKOFF,
    MAX_BACKOFF_READY,
    REFUSAL_PATIENCE,
    SETTLED_AFTER,
    STOP_MARGIN,
    TABLE,
    Action,
    Event,
    FleetState,
    Slot,
    State,
    backoff_delay,
    classify_exit,
    transition,
)

GRACE = 30.0
NOW = 1000.0


def after(slot: Slot, *events: Event, now: float = NOW) -> tuple[Slot, Action]:
    action = Action.NOTHING
    for event in events:
        slot, action = transition(slot, event, now, grace=GRACE, jitter=0.0)
    return slot, action


STARTING, _ = after(Slot(), Event.DUE)
READY, _ = after(STARTING, Event.READY)
STOPPING, _ = after(READY, Event.STOP)
BACKOFF, _ = after(READY, Event.DIED)
GONE, _ = after(Slot(), Event.STOP)
TRIAL, _ = after(Slot(trial=True), Event.DUE)
TRIED, _ = after(TRIAL, Event.READY)
STALLED, _ = after(READY, Event.STALLED)
HANGS, _ = after(STARTING, Event.STALLED)
TRIAL_HANGS, _ = after(TRIAL, Event.STALLED)
TRIED_HANGS, _ = after(TRIED, Event.STALLED)
GONE_AT_START, _ = after(STARTING, Event.FAILED)
SLOTS = {slot.state: slot for slot in (STARTING, READY, STOPPING, BACKOFF, GONE)}


@pytest.mark.parametrize(
    ("slot", "event", "state", "action"),
    [
        (Slot(), Event.DUE, State.STARTING, Action.SPAWN),
        (STARTING, Event.READY, State.READY, Action.NOTHING),
        (STARTING, Event.LEFT, State.GONE, Action.NOTHING),
        (STARTING, Event.FAILED, State.GONE, Action.GIVE_UP),
        (STARTING, Event.DIED, State.BACKOFF, Action.NOTHING),
        (TRIAL, Event.REFUSED, State.GONE, Action.ABORT_REPLACEMENT),
        (STALLED, Event.REFUSED, State.BACKOFF, Action.NOTHING),
        (STOPPING, Event.REFUSED, State.GONE, Action.NOTHING),
        (STARTING, Event.STOP, State.STOPPING, Action.TERMINATE),
        (STARTING, Event.QUIT, State.STOPPING, Action.QUIT),
        (READY, Event.LEFT, State.GONE, Action.NOTHING),
        (READY, Event.FAILED, State.GONE, Action.GIVE_UP),
        (READY, Event.DIED, State.BACKOFF, Action.NOTHING),
        (READY, Event.STOP, State.STOPPING, Action.TERMINATE),
        (READY, Event.QUIT, State.STOPPING, Action.QUIT),
        (STOPPING, Event.READY, State.STOPPING, Action.NOTHING),
        (STOPPING, Event.STOP, State.STOPPING, Action.NOTHING),
        (STOPPING, Event.QUIT, State.STOPPING, Action.QUIT),
        (STOPPING, Event.OVERDUE, State.STOPPING, Action.KILL),
        (STOPPING, Event.LEFT, State.GONE, Action.NOTHING),
        (STOPPING, Event.FAILED, State.GONE, Action.NOTHING),
        (STOPPING, Event.DIED, State.GONE, Action.NOTHING),
        (TRIAL, Event.READY, State.READY, Action.NOTHING),
        (TRIAL, Event.FAILED, State.GONE, Action.ABORT_REPLACEMENT),
        (TRIAL, Event.DIED, State.GONE, Action.ABORT_REPLACEMENT),
        (TRIAL, Event.LEFT, State.GONE, Action.NOTHING),
        (TRIAL, Event.STOP, State.STOPPING, Action.TERMINATE),
        (TRIED, Event.SETTLED, State.READY, Action.NOTHING),
        (TRIED, Event.FAILED, State.GONE, Action.ABORT_REPLACEMENT),
        (TRIED, Event.DIED, State.GONE, Action.ABORT_REPLACEMENT),
        (TRIED, Event.LEFT, State.GONE, Action.NOTHING),
        (TRIED, Event.STOP, State.STOPPING, Action.TERMINATE),
        (READY, Event.SILENT, State.READY, Action.DUMP),
        (READY, Event.STALLED, State.STOPPING, Action.DUMP_AND_TERMINATE),
        (STALLED, Event.STALLED, State.STOPPING, Action.NOTHING),
        (STALLED, Event.OVERDUE, State.STOPPING, Action.KILL),
        (STALLED, Event.DIED, State.BACKOFF, Action.NOTHING),
        (STALLED, Event.LEFT, State.BACKOFF, Action.NOTHING),
        (STALLED, Event.FAILED, State.BACKOFF, Action.NOTHING),
        (STALLED, Event.STOP, State.STOPPING, Action.NOTHING),
        (STALLED, Event.QUIT, State.STOPPING, Action.QUIT),
        (STARTING, Event.SILENT, State.STARTING, Action.DUMP),
        (STARTING, Event.STALLED, State.STOPPING, Action.DUMP_AND_TERMINATE),
        (HANGS, Event.READY, State.STOPPING, Action.NOTHING),
        (HANGS, Event.DIED, State.BACKOFF, Action.NOTHING),
        (HANGS, Event.LEFT, State.BACKOFF, Action.NOTHING),
        (HANGS, Event.OVERDUE, State.STOPPING, Action.KILL),
        (TRIAL_HANGS, Event.DIED, State.GONE, Action.ABORT_REPLACEMENT),
        (TRIAL_HANGS, Event.LEFT, State.GONE, Action.ABORT_REPLACEMENT),
        (TRIED_HANGS, Event.DIED, State.GONE, Action.ABORT_REPLACEMENT),
        (BACKOFF, Event.DUE, State.STARTING, Action.SPAWN),
        (BACKOFF, Event.STOP, State.GONE, Action.NOTHING),
        (BACKOFF, Event.QUIT, State.GONE, Action.NOTHING),
    ],
    ids=lambda value: value.state.value if isinstance(value, Slot) else value.value,
)
def test_transition_of_each_state(slot: Slot, event: Event, state: State, action: Action) -> None:
    then, done = after(slot, event)
    assert (then.state, done) == (state, action)


@pytest.mark.parametrize("state", State)
@pytest.mark.parametrize("event", Event)
def test_unlisted_event_changes_nothing(state: State, event: Event) -> None:
    if event not in TABLE[state]:
        assert after(SLOTS[state], event) == (SLOTS[state], Action.NOTHING)


@pytest.mark.parametrize("state", State)
def test_slot_has_timer_only_in_timed_states(state: State) -> None:
    assert (SLOTS[state].timer is not None) == (state in (State.BACKOFF, State.STOPPING))
    assert state is State.GONE or TABLE[state], "no state but GONE is a dead end"


def test_nothing_leaves_gone() -> None:
    assert not TABLE[State.GONE]


def test_crash_at_boot_becomes_hopeless_after_retries() -> None:
    slot = Slot()
    for _ in range(BOOT_TRIES - 1):
        slot, action = after(slot, Event.DUE, Event.DIED)
        assert (slot.state, action) == (State.BACKOFF, Action.NOTHING)
    slot, action = after(slot, Event.DUE, Event.DIED)
    assert (slot.state, action) == (State.GONE, Action.GIVE_UP)


@pytest.mark.parametrize("end", [Event.DIED, Event.LEFT, Event.FAILED])
def test_hanging_start_counts_as_death(end: Event) -> None:
    slot, _ = after(Slot(), Event.DUE, Event.STALLED, end)
    slot, _ = after(slot, Event.DUE, Event.STALLED, Event.OVERDUE, end)
    assert (slot.state, slot.deaths) == (State.BACKOFF, 2)
    assert after(slot, Event.DUE, Event.STALLED, end) == (Slot(State.GONE, None, 2, again=True), Action.GIVE_UP)
    once_ready, _ = after(READY, Event.DIED, Event.DUE, Event.STALLED, end)
    assert (once_ready.state, once_ready.deaths) == (State.BACKOFF, 2)
    assert after(once_ready, Event.DUE, Event.STALLED, end)[0].state is State.BACKOFF, "it had worked before"
    assert after(HANGS, Event.STOP, end)[0].state is State.GONE


def test_slot_that_was_ready_never_gives_up_on_crashes() -> None:
    slot = READY
    for _ in range(100):
        slot, action = after(slot, Event.DIED, Event.DUE)
        assert (slot.state, action) == (State.STARTING, Action.SPAWN)
        slot, action = after(slot, Event.DIED, Event.DUE)
        assert (slot.state, action) == (State.STARTING, Action.SPAWN)


def test_settled_replacement_is_an_ordinary_worker() -> None:
    assert TRIED.trial
    assert (TRIED.timer, TRIED.timed_event) == (NOW + SETTLED_AFTER, Event.SETTLED)
    slot, _ = after(TRIED, Event.SETTLED)
    assert not slot.trial
    assert slot.timer is None
    assert after(slot, Event.DIED)[0].state is State.BACKOFF
    assert after(slot, Event.FAILED)[1] is Action.GIVE_UP


def test_replacement_that_crashes_on_trial_is_not_retried() -> None:
    assert after(TRIAL, Event.DIED)[0].state is State.GONE


def test_silence_keeps_ready_since() -> None:
    assert after(READY, Event.SILENT, now=NOW + 5)[0] == READY


def test_stalled_worker_is_followed_unless_all_stop() -> None:
    assert STALLED.timer == NOW + STOP_MARGIN, "it hears nothing, so a grace is of no use to it"
    killed, _ = after(STALLED, Event.OVERDUE)
    assert after(killed, Event.DIED)[0].state is State.BACKOFF
    for order in Event.STOP, Event.QUIT:
        assert after(STALLED, order, Event.DIED)[0].state is State.GONE
        assert after(killed, order, Event.DIED)[0].state is State.GONE
    assert after(STALLED, Event.STOP)[0].timer == STALLED.timer, "an order to drain does not put the kill off"


def test_stalled_worker_heard_again_has_grace_and_is_not_silent() -> None:
    assert STALLED.silent
    heard, _ = after(STALLED, Event.HEARD, now=NOW + 1)
    assert (heard.timer, heard.silent, heard.again) == (NOW + 1 + GRACE + STOP_MARGIN, False, True)
    assert after(heard, Event.HEARD, now=NOW + 2)[0] == heard, "once"
    for order in Event.STOP, Event.QUIT, Event.OVERDUE:
        told, _ = after(STALLED, order)
        assert after(told, Event.HEARD, now=NOW + 1)[0].timer == told.timer
    assert after(STOPPING, Event.HEARD, now=NOW + 1)[0] == STOPPING
    assert after(STALLED, Event.OVERDUE)[0].silent
    assert not after(STALLED, Event.STOP, Event.OVERDUE)[0].silent, "our kill"


@pytest.mark.parametrize(
    ("to_next", "delays"),
    [
        ((Event.DUE,), [0.1, 0.2, 0.4, 0.8, 1.6, 3.2, 6.4, 12.8, 25.6, MAX_BACKOFF, MAX_BACKOFF]),
        ((Event.DUE, Event.READY), [0.1, 0.2, 0.4, 0.8, *[MAX_BACKOFF_READY] * 7]),
    ],
    ids=["booting", "at work"],
)
def test_backoff_doubles_up_to_its_maximum(to_next: tuple[Event, ...], delays: list[float]) -> None:
    slot, seen = after(READY, Event.DIED)[0], []
    for _ in range(11):
        assert slot.timer is not None
        seen.append(slot.timer - NOW)
        slot, _ = after(slot, *to_next, Event.DIED)
    assert seen == pytest.approx(delays)


def test_refusal_at_first_start_is_failure() -> None:
    assert after(STARTING, Event.REFUSED) == (GONE_AT_START, Action.GIVE_UP)


def test_refused_slot_that_was_ready_starts_again_for_a_minute() -> None:
    slot, action = after(READY, Event.REFUSED)
    assert (slot.state, action) == (State.BACKOFF, Action.NOTHING)
    now, tries = NOW, 0
    while slot.state is State.BACKOFF:
        assert slot.timer is not None
        assert slot.timer - now <= MAX_BACKOFF_READY
        now, tries = slot.timer, tries + 1
        slot, action = after(slot, Event.DUE, Event.REFUSED, now=now)
    assert (slot.state, action) == (State.GONE, Action.GIVE_UP)
    assert NOW + REFUSAL_PATIENCE <= now < NOW + REFUSAL_PATIENCE + MAX_BACKOFF_READY
    assert tries > REFUSAL_PATIENCE / MAX_BACKOFF_READY


def starts_until(slot: Slot, fleet: FleetState, event: Event, until: float) -> tuple[Slot, Action, list[float]]:
    """Start the slot again and again, each process of which ends at once in this way; return the delays too."""
    now, action, delays = NOW, Action.NOTHING, []
    while slot.state is State.BACKOFF and now < until:
        assert slot.timer is not None
        delays.append(slot.timer - now)
        now = slot.timer
        slot, _ = transition(slot, Event.DUE, now, grace=GRACE)
        slot, action = transition(slot, event, now, grace=GRACE, fleet=fleet, jitter=0.0)
    return slot, action, delays


def test_refused_slot_beside_others_never_gives_up() -> None:
    """For a minute as without them, then as after deaths."""
    died, _ = after(READY, Event.DIED)
    slot, action, delays = starts_until(died, FleetState(True, True), Event.REFUSED, NOW + 600)
    assert (slot.state, action) == (State.BACKOFF, Action.NOTHING)
    soon = [delay for delay in delays if delay <= MAX_BACKOFF_READY]
    assert delays == soon + [MAX_BACKOFF] * (len(delays) - len(soon))
    assert REFUSAL_PATIENCE <= sum(soon) < REFUSAL_PATIENCE + 2 * MAX_BACKOFF_READY


def test_first_start_refused_beside_others_is_tried_for_a_minute() -> None:
    fresh, _ = transition(STARTING, Event.REFUSED, NOW, grace=GRACE, fleet=FleetState(True, True), jitter=0.0)
    slot, action, delays = starts_until(fresh, FleetState(True, True), Event.REFUSED, NOW + 600)
    assert (slot.state, action) == (State.GONE, Action.GIVE_UP)
    assert REFUSAL_PATIENCE <= sum(delays) < REFUSAL_PATIENCE + 2 * MAX_BACKOFF_READY


@pytest.mark.parametrize("others_work", [True, False])
def test_code_that_fails_ends_only_an_idle_fleet(others_work: bool) -> None:
    died, _ = after(READY, Event.DIED)
    slot, action, delays = starts_until(died, FleetState(others_work, True), Event.FAILED, NOW + 600)
    assert (slot.state is State.BACKOFF, action) == (others_work, Action.NOTHING if others_work else Action.GIVE_UP)
    assert others_work is (max(delays) == MAX_BACKOFF)


def test_healthy_time_resets_refusals() -> None:
    slot, _ = after(READY, Event.REFUSED)
    slot, _ = after(slot, Event.DUE, Event.READY, now=NOW + 30)
    slot, action = after(slot, Event.REFUSED, now=NOW + 30 + REFUSAL_PATIENCE)
    assert (slot.state, action) == (State.BACKOFF, Action.NOTHING)
    assert slot.refused_since == NOW + 30 + REFUSAL_PATIENCE


def test_short_ready_time_keeps_refusals() -> None:
    slot, _ = after(READY, Event.REFUSED)
    slot, _ = after(slot, Event.DUE, Event.READY, now=NOW + REFUSAL_PATIENCE)
    slot, action = after(slot, Event.REFUSED, now=NOW + REFUSAL_PATIENCE + 1)
    assert (slot.state, action) == (State.GONE, Action.GIVE_UP)


def test_healthy_time_resets_deaths() -> None:
    slot = Slot(State.READY, None, deaths=7, ready_since=NOW, was_ready=True)
    assert after(slot, Event.DIED, now=NOW + HEALTHY_AFTER - 0.1)[0].deaths == 8
    assert after(slot, Event.DIED, now=NOW + HEALTHY_AFTER)[0].deaths == 1


@pytest.mark.parametrize("deaths", [1, 2, 9, 10, 50, 5000])
def test_jitter_subtracts_at_most_half(deaths: int) -> None:
    full = backoff_delay(deaths, 0.0)
    assert full / 2 <= backoff_delay(deaths, 0.999) < backoff_delay(deaths, 0.5) < full <= MAX_BACKOFF


def test_stop_ends_within_grace_and_five_seconds() -> None:
    slot, _ = after(READY, Event.STOP)
    assert slot.timer == NOW + GRACE + STOP_MARGIN
    assert STOP_MARGIN < 5


def test_quit_never_postpones_the_kill() -> None:
    slot, _ = after(READY, Event.STOP)
    nearer, _ = after(slot, Event.QUIT, now=NOW + 1)
    assert nearer.timer == NOW + 1 + STOP_MARGIN
    assert after(TRIED, Event.QUIT)[0].timer == NOW + STOP_MARGIN, "not when it would have settled"
    late, _ = after(slot, Event.QUIT, now=NOW + GRACE + 1)
    assert late.timer == slot.timer


def test_child_is_killed_once() -> None:
    killed, action = after(STOPPING, Event.OVERDUE)
    assert (killed.timer, action) == (None, Action.KILL)


@pytest.mark.parametrize(
    ("state", "code", "reason", "event"),
    [
        (State.STOPPING, 0, "drained", Event.LEFT),
        (State.READY, 0, "drained", Event.DIED),  # unordered: a SIGTERM from elsewhere
        (State.READY, 3, "drained", Event.DIED),
        (State.STARTING, 0, "drained", Event.DIED),
        (State.READY, 0, "notified", Event.LEFT),
        (State.READY, 0, "burst", Event.LEFT),
        (State.READY, 3, "burst", Event.FAILED),  # the lifespan failed at its end
        (State.STOPPING, 3, "burst", Event.LEFT),  # it was told to stop: the log line of its end has the failure
        (State.STOPPING, 3, "drained", Event.LEFT),
        (State.READY, 3, "notified", Event.LEFT),
        (State.READY, 0, None, Event.DIED),
        (State.READY, -9, "burst", Event.DIED),
        (State.READY, -11, None, Event.DIED),
        (State.STARTING, 3, "failed", Event.FAILED),
        (State.STARTING, 4, "failed", Event.FAILED),
        (State.STARTING, 5, "failed", Event.REFUSED),
        (State.READY, 5, "failed", Event.REFUSED),
        (State.READY, 3, "failed", Event.DIED),
        (State.STARTING, 3, None, Event.DIED),
        (State.STARTING, 4, None, Event.DIED),
        (State.READY, 5, None, Event.DIED),
        (State.READY, 1, "failed", Event.DIED),
    ],
)
def test_exit_is_classified_by_state_code_and_reason(state: State, code: int, reason: str | None, event: Event) -> None:
    assert classify_exit(state, code, reason) is event
