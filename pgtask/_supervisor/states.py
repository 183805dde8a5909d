"""The life of a worker slot as a table: states, events, and what is done about them. Pure values, no I/O.

Theory of operation. A supervisor with `--procs N` has N slots. A slot holds at most one process at a time,
and it lives longer than its processes. The parent observes (a message on the pipe, a death at `waitpid`, a
signal, a timer), turns what it saw into one `Event`, asks `react` for the next value of the slot, and carries
out the one `Action` that comes with it. Everything that decides is here; everything that touches the system
is in `parent` and `child`.

                 due                ready
    BACKOFF ------------> STARTING ---------> READY      left, failed, hopeless and unfit end in GONE
       ^ |                  | |                | |      from everywhere; quit goes where stop goes
       | +--- stop ---+     | + stop, stalled + | |
       |              v     |        stalled v v |
       |             GONE <-|------ died - STOPPING -- ended, if another is to follow --> BACKOFF
       |                    |                    |
       +------- died -------+------- died -------+

- A slot begins in BACKOFF with nothing to wait for, so the first start is no special case.
- A death that nobody asked for is followed by a delay: 0.1 s, doubled with each further one up to 30 s (1 s if
  the child was ready), with jitter so that N children which die of one cause do not come back as one. Ten
  seconds of being ready forget the past.
- A child that says why it failed, and exits with one of our codes, is believed at once (FAILED). One that
  dies without a word before it was ever ready gets `BOOT_TRIES` tries, then it is HOPELESS: a crash while
  booting mends itself seldom, and a supervisor that can never work must say so with its exit code.
- Whatever happens to a child that was told to stop, it is gone and not replaced. The timer of STOPPING bounds
  how long that may take.
- A child whose loop is silent is asked for its stacks (SILENT), and told to leave when that goes on (STALLED). Its
  slot keeps on: when it is gone, another follows, as after a death. Since it hears nothing, it has less time; if it is
  heard again (HEARD), it has as much as the others. One that was silent before it was ever ready (its import hangs)
  counts as one that died then.
- A replacement of a child that works (fresh code, or too many tasks or too much memory in the old one) is a slot of
  its own, on trial: the old one is told to stop only when the new one has been ready for a little while (SETTLED). If
  it never is, for whatever reason, that slot is UNFIT and gone, and nothing else has changed. `replace` says who is
  replaced when.
"""

from __future__ import annotations

import enum
import random
from collections.abc import Mapping

import msgspec

__all__ = ["BOOT_TRIES", "Action", "Event", "ExitCode", "Slot", "State", "backoff_delay", "judge", "react"]

BACKOFF_FIRST, BACKOFF_MOST = 0.1, 30.0
BACKOFF_READY = 1.0  # the most after a death at work: a task that kills its process waits by itself, and not for ever
HEALTHY_AFTER = 10.0
SETTLED_AFTER = 0.5  # seconds of being ready that end a trial: what fails with the first tasks has failed by then
BOOT_TRIES = 3
STOP_MARGIN = 4.25  # seconds for what a worker does after its grace: cancel, release its leases, close


class ExitCode(enum.IntEnum):
    """The contract of the supervisor with whoever started it, and of a child with its parent."""

    OK = 0
    PARKED = 1  # a burst finished, but some task is parked with an error
    USAGE = 2
    BOOT = 3
    APP = 4
    DATABASE = 5
    INTERRUPTED = 130  # Ctrl-C before there was a worker


class State(enum.Enum):
    BACKOFF = "backoff"  # no process; one will be started when the timer says so
    STARTING = "starting"  # forked, has not said that it is ready
    READY = "ready"
    STOPPING = "stopping"  # told to stop; killed when the timer says so
    GONE = "gone"  # no process, and there will be none


class Event(enum.Enum):
    DUE = "due"  # BACKOFF's timer
    READY = "ready"  # the child said so
    LEFT = "left"  # it left by itself, in order: drained, notified, or nothing left in a burst
    FAILED = "failed"  # it left with a permanent error and said which
    DIED = "died"  # it died any other way, or could not be forked
    HOPELESS = "hopeless"  # died once too often without ever having been ready
    SETTLED = "settled"  # READY's timer, on trial
    UNFIT = "unfit"  # ended on trial
    ENDED = "ended"  # it is gone in whatever way, and another is to follow
    SILENT = "silent"  # its loop has not been heard of for a while
    STALLED = "stalled"  # nor for a long while
    HEARD = "heard"  # it said something
    STOP = "stop"  # the supervisor drains
    QUIT = "quit"  # the supervisor stops now
    OVERDUE = "overdue"  # STOPPING's timer


class Action(enum.Enum):
    NOTHING = "nothing"
    SPAWN = "spawn"
    TERMINATE = "terminate"  # SIGTERM: drain
    QUIT = "quit"  # SIGQUIT: stop now
    KILL = "kill"
    GIVE_UP = "give up"  # stop the whole supervisor with this child's exit code
    KEEP_OLD = "keep old"  # forget the replacement
    DUMP = "dump"  # have its stacks written into the log
    DUMP_AND_TERMINATE = "dump and terminate"


class Slot(msgspec.Struct, frozen=True):
    """One slot. `timer`: when DUE happens in BACKOFF, SETTLED in READY, OVERDUE in STOPPING. Times are monotonic."""

    state: State = State.BACKOFF
    timer: float | None = 0.0
    deaths: int = 0  # in a row, since the slot was last healthy
    ready_since: float | None = None
    was_ready: bool = False
    trial: bool = False  # the replacement of a worker that goes on until this one has settled
    again: bool = False  # STOPPING, but another process is to follow
    silent: bool = False  # STOPPING since its loop was silent, and not heard of again

    @property
    def timed_event(self) -> Event:
        return _TIMED.get(self.state, Event.OVERDUE)


_NOTHING = Action.NOTHING
_TIMED = {State.BACKOFF: Event.DUE, State.READY: Event.SETTLED}

TABLE: Mapping[State, Mapping[Event, tuple[State, Action]]] = {
    State.BACKOFF: {
        Event.DUE: (State.STARTING, Action.SPAWN),
        Event.STOP: (State.GONE, _NOTHING),
        Event.QUIT: (State.GONE, _NOTHING),
    },
    State.STARTING: {
        Event.READY: (State.READY, _NOTHING),
        Event.LEFT: (State.GONE, _NOTHING),
        Event.FAILED: (State.GONE, Action.GIVE_UP),
        Event.DIED: (State.BACKOFF, _NOTHING),
        Event.HOPELESS: (State.GONE, Action.GIVE_UP),
        Event.UNFIT: (State.GONE, Action.KEEP_OLD),
        Event.SILENT: (State.STARTING, Action.DUMP),
        Event.STALLED: (State.STOPPING, Action.DUMP_AND_TERMINATE),
        Event.STOP: (State.STOPPING, Action.TERMINATE),
        Event.QUIT: (State.STOPPING, Action.QUIT),
    },
    State.READY: {
        Event.SETTLED: (State.READY, _NOTHING),
        Event.LEFT: (State.GONE, _NOTHING),
        Event.FAILED: (State.GONE, Action.GIVE_UP),
        Event.DIED: (State.BACKOFF, _NOTHING),
        Event.UNFIT: (State.GONE, Action.KEEP_OLD),
        Event.SILENT: (State.READY, Action.DUMP),
        Event.STALLED: (State.STOPPING, Action.DUMP_AND_TERMINATE),
        Event.STOP: (State.STOPPING, Action.TERMINATE),
        Event.QUIT: (State.STOPPING, Action.QUIT),
    },
    State.STOPPING: {
        Event.LEFT: (State.GONE, _NOTHING),
        Event.FAILED: (State.GONE, _NOTHING),
        Event.DIED: (State.GONE, _NOTHING),
        Event.ENDED: (State.BACKOFF, _NOTHING),
        Event.HOPELESS: (State.GONE, Action.GIVE_UP),
        Event.UNFIT: (State.GONE, Action.KEEP_OLD),
        Event.STOP: (State.STOPPING, _NOTHING),
        Event.QUIT: (State.STOPPING, Action.QUIT),
        Event.HEARD: (State.STOPPING, _NOTHING),
        Event.OVERDUE: (State.STOPPING, Action.KILL),
    },
    State.GONE: {},
}


def react(slot: Slot, event: Event, now: float, *, grace: float, jitter: float | None = None) -> tuple[Slot, Action]:
    """The slot after `event`, and what to do. What the table does not list for a state changes nothing.

    `jitter` in [0, 1) is for tests; without it, it is random.
    """
    event = _in_the_light_of(slot, event)
    if event not in TABLE[slot.state]:
        return slot, Action.NOTHING
    state, action = TABLE[slot.state][event]
    match state:
        case State.BACKOFF:
            slot = _after_death(slot, now, random.random() if jitter is None else jitter)
        case State.STOPPING:
            again = event is Event.STALLED or (slot.again and event in (Event.OVERDUE, Event.HEARD))
            silent = event is Event.STALLED or (slot.silent and event is Event.OVERDUE)
            timer = _deadline(slot, event, now, grace)
            slot = msgspec.structs.replace(slot, state=state, timer=timer, again=again, silent=silent)
        case State.READY if slot.state is not State.READY:
            timer = now + SETTLED_AFTER if slot.trial else None
            slot = msgspec.structs.replace(slot, state=state, timer=timer, ready_since=now, was_ready=True)
        case State.READY if event is Event.SETTLED:
            slot = msgspec.structs.replace(slot, timer=None, trial=False)
        case State.READY:
            pass
        case _:
            slot = msgspec.structs.replace(slot, state=state, timer=None, ready_since=None, silent=False)
    return slot, action


def _in_the_light_of(slot: Slot, event: Event) -> Event:
    """What an end means for this very slot."""
    if event not in (Event.LEFT, Event.FAILED, Event.DIED):
        return event
    stalled = slot.state is State.STOPPING and slot.again
    if slot.state is State.STOPPING and not stalled:
        return event
    booting = slot.ready_since is None
    if slot.trial and (stalled or event is not Event.LEFT):
        return Event.UNFIT
    if booting and not slot.was_ready and (stalled or event is Event.DIED) and slot.deaths + 1 >= BOOT_TRIES:
        return Event.HOPELESS
    return Event.ENDED if stalled else event


def judge(state: State, code: int, reason: str | None) -> Event:
    """What the end of a process means: its exit code (negative: the signal), and the reason it gave, if any.

    Told, not guessed: our exit codes count only with a reason, since user code may end a process as well.
    """
    if reason is None:
        return Event.DIED
    if reason != "failed":
        if code == ExitCode.BOOT:  # the lifespan failed at its end, and would again for whoever took its place
            return Event.FAILED if reason == "burst" and state is State.READY else Event.LEFT
        return Event.LEFT if code == ExitCode.OK else Event.DIED
    if code in (ExitCode.APP, ExitCode.DATABASE):
        return Event.FAILED
    return Event.FAILED if code == ExitCode.BOOT and state is State.STARTING else Event.DIED


def backoff_delay(deaths: int, jitter: float, most: float = BACKOFF_MOST) -> float:
    """Seconds before the next start after `deaths` in a row: between half of the full delay and all of it."""
    full = min(most, BACKOFF_FIRST * 2.0 ** min(deaths - 1, 32))
    return full * (1.0 - jitter / 2)


def _after_death(slot: Slot, now: float, jitter: float) -> Slot:
    healthy = slot.ready_since is not None and now - slot.ready_since >= HEALTHY_AFTER
    deaths = 1 if healthy else slot.deaths + 1
    most = BACKOFF_MOST if slot.ready_since is None else BACKOFF_READY
    return Slot(State.BACKOFF, now + backoff_delay(deaths, jitter, most), deaths, None, slot.was_ready)


def _deadline(slot: Slot, event: Event, now: float, grace: float) -> float | None:
    """When a stopping child is killed. A second, sharper order can only bring that nearer."""
    if event is Event.OVERDUE:
        return None
    if event is Event.HEARD:
        return now + grace + STOP_MARGIN if slot.silent and slot.timer is not None else slot.timer
    if event is Event.STOP:
        return slot.timer if slot.state is State.STOPPING else now + grace + STOP_MARGIN
    deadline = now + STOP_MARGIN
    return min(slot.timer, deadline) if slot.state is State.STOPPING and slot.timer is not None else deadline
