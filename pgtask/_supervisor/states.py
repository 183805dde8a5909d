"""The life of a worker slot as a table: states, events, actions. Pure values, no I/O.

Theory of operation. A supervisor with `--procs N` has N slots. A slot holds at most one process at a time, and it
lives longer than its processes. The parent observes (a message on the pipe, a death at `waitpid`, a signal, a timer),
turns its observation into one `Event`, asks `transition` for the next value of the slot, and performs the one `Action`
that comes with it. Every decision is here; everything that touches the system is in `parent` and `child`.

                 due                ready
    BACKOFF ------------> STARTING ---------> READY      left, failed, hopeless and unfit end in GONE
       ^ |                  | |                | |      from everywhere; quit goes where stop goes
       | +--- stop ---+     | + stop, stalled + | |
       |              v     |        stalled v v |
       |             GONE <-|------ died - STOPPING -- ended, if another is to follow --> BACKOFF
       |                    |                    |
       +------- died -------+------- died -------+

- A slot begins in BACKOFF with a timer that is due, so the first start is no special case.
- A delay follows each unexpected death: 0.1 s, doubled with each further one up to 30 s (1 s if the child was ready),
  with jitter so that N children which die of one cause do not restart at once. Ten seconds of being ready reset it.
- The supervisor believes a child that gives a reason for its failure and exits with one of our codes (FAILED). A child
  that dies without a reason before it was ever ready gets `BOOT_TRIES` tries, then it is HOPELESS: a crash while
  booting rarely fixes itself, and a supervisor that can never work must report that by its exit code.
- The supervisor also believes a child that the database refuses before any worker was ready. After that a refusal may
  be temporary (a password change, a restarted pooler): the slot starts again (REFUSED) for `REFUSAL_PATIENCE` seconds,
  then it has FAILED.
- A slot that was ready does not end the work of others. If it FAILED while it boots and another worker is ready, that
  counts as a death: its code was replaced by code that does not load, or the database refuses only new sessions.
- A child that was told to stop ends in GONE and is not replaced, in every case. The timer of STOPPING bounds how long
  that may take.
- The supervisor asks a child whose loop is silent for its stacks (SILENT), and tells it to stop when the silence
  continues (STALLED). The slot stays: another child follows, as after a death. Since a silent child does not react, it
  gets less time; if it sends a message (HEARD), it gets as much as the others. A child that was silent before it was
  ever ready (its import hangs) counts as one that died then.
- A replacement of a working child (fresh code, or too many tasks or too much memory in the old one) is a slot of its
  own, on trial: the old child is told to stop only when the new one has been ready for half a second (SETTLED). A
  replacement that never gets there is UNFIT and GONE, and nothing else has changed. `rolling_restart` decides the
  order of replacements.
"""

from __future__ import annotations

import enum
import random
from collections.abc import Mapping

import msgspec

from pgtask._backoff import exponential_delay
from pgtask._status import ExitCode

__all__ = [
    "BOOT_TRIES",
    "FAILURES",
    "INTERRUPTIONS",
    "STOP_MARGIN",
    "Action",
    "Event",
    "ExitCode",
    "FleetState",
    "Slot",
    "State",
    "backoff_delay",
    "classify_exit",
    "refine_event",
    "transition",
]

INITIAL_BACKOFF, MAX_BACKOFF = 0.1, 30.0
MAX_BACKOFF_READY = 1.0  # after a death at work: a task that kills its process has its own delay, of a few seconds
HEALTHY_AFTER = 10.0
SETTLED_AFTER = 0.5  # seconds of being ready that end a trial: a failure with the first tasks shows by then
BOOT_TRIES = 3
REFUSAL_PATIENCE = 60.0  # seconds in which a slot that was ready starts again although the database refuses it
STOP_MARGIN = 4.25  # seconds in which a worker cancels its steps, releases its leases and closes, after its grace


INTERRUPTIONS = {
    "SIGHUP": ExitCode.HUNG_UP,
    "SIGINT": ExitCode.INTERRUPTED,
    "SIGQUIT": ExitCode.QUIT,
}
"""The exit code of a burst by the cause of its stop; any other cause is TERMINATED."""


class State(enum.Enum):
    BACKOFF = "backoff"  # no process; the next one starts at the timer
    STARTING = "starting"  # forked, not yet ready
    READY = "ready"
    STOPPING = "stopping"  # told to stop; killed at the timer
    GONE = "gone"  # no process, and none will follow


class Event(enum.Enum):
    DUE = "due"  # BACKOFF's timer
    READY = "ready"  # the child sent Ready
    LEFT = "left"  # it left in order: drained when it was told to, notified, or nothing left in a burst
    FAILED = "failed"  # it left with a permanent error and its reason
    REFUSED = "refused"  # the database refused it, which is permanent only in a slot that was never ready
    DIED = "died"  # it died in any other way, or the fork failed
    HOPELESS = "hopeless"  # the last of BOOT_TRIES deaths in a slot that was never ready
    SETTLED = "settled"  # READY's timer, on trial
    UNFIT = "unfit"  # a replacement ended on trial
    ENDED = "ended"  # a stalled child has ended, and another follows
    SILENT = "silent"  # its loop has sent nothing for a while
    STALLED = "stalled"  # its loop has sent nothing for --stall seconds
    HEARD = "heard"  # it sent a message
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
    ABORT_REPLACEMENT = "abort replacement"  # the old worker stays
    DUMP = "dump"  # ask it for its stacks
    DUMP_AND_TERMINATE = "dump and terminate"


class Slot(msgspec.Struct, frozen=True):
    """One slot. `timer` is the time of DUE in BACKOFF, SETTLED in READY, OVERDUE in STOPPING, in monotonic seconds."""

    state: State = State.BACKOFF
    timer: float | None = 0.0
    deaths: int = 0  # in a row, since the slot was last healthy
    ready_since: float | None = None
    was_ready: bool = False
    trial: bool = False  # the replacement of a worker that works until this one has settled
    refused_since: float | None = None
    again: bool = False  # STOPPING, and another process follows
    silent: bool = False  # STOPPING because its loop was silent, and no message since

    @property
    def timed_event(self) -> Event:
        return _TIMED.get(self.state, Event.OVERDUE)


class FleetState(msgspec.Struct, frozen=True):
    """The workers beside a slot: `others_work` if one of them is ready, `was_ready` if any worker ever was."""

    others_work: bool = False
    was_ready: bool = False


ALONE = FleetState()
_NOTHING = Action.NOTHING
FAILURES = (Event.FAILED, Event.REFUSED)
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
        Event.REFUSED: (State.BACKOFF, _NOTHING),
        Event.DIED: (State.BACKOFF, _NOTHING),
        Event.HOPELESS: (State.GONE, Action.GIVE_UP),
        Event.UNFIT: (State.GONE, Action.ABORT_REPLACEMENT),
        Event.SILENT: (State.STARTING, Action.DUMP),
        Event.STALLED: (State.STOPPING, Action.DUMP_AND_TERMINATE),
        Event.STOP: (State.STOPPING, Action.TERMINATE),
        Event.QUIT: (State.STOPPING, Action.QUIT),
    },
    State.READY: {
        Event.SETTLED: (State.READY, _NOTHING),
        Event.LEFT: (State.GONE, _NOTHING),
        Event.FAILED: (State.GONE, Action.GIVE_UP),
        Event.REFUSED: (State.BACKOFF, _NOTHING),
        Event.DIED: (State.BACKOFF, _NOTHING),
        Event.UNFIT: (State.GONE, Action.ABORT_REPLACEMENT),
        Event.SILENT: (State.READY, Action.DUMP),
        Event.STALLED: (State.STOPPING, Action.DUMP_AND_TERMINATE),
        Event.STOP: (State.STOPPING, Action.TERMINATE),
        Event.QUIT: (State.STOPPING, Action.QUIT),
    },
    State.STOPPING: {
        Event.LEFT: (State.GONE, _NOTHING),
        Event.FAILED: (State.GONE, _NOTHING),
        Event.REFUSED: (State.GONE, _NOTHING),
        Event.DIED: (State.GONE, _NOTHING),
        Event.ENDED: (State.BACKOFF, _NOTHING),
        Event.HOPELESS: (State.GONE, Action.GIVE_UP),
        Event.UNFIT: (State.GONE, Action.ABORT_REPLACEMENT),
        Event.STOP: (State.STOPPING, _NOTHING),
        Event.QUIT: (State.STOPPING, Action.QUIT),
        Event.HEARD: (State.STOPPING, _NOTHING),
        Event.OVERDUE: (State.STOPPING, Action.KILL),
    },
    State.GONE: {},
}


def transition(
    slot: Slot, event: Event, now: float, *, grace: float, fleet: FleetState = ALONE, jitter: float | None = None
) -> tuple[Slot, Action]:
    """Return the slot after `event`, and what to do. An event that the table does not list for a state changes nothing.

    `grace` in seconds. `jitter` in [0, 1) is for tests; by default it is random.
    """
    event = refine_event(slot, event, now, fleet)
    if event not in TABLE[slot.state]:
        return slot, Action.NOTHING
    state, action = TABLE[slot.state][event]
    match state:
        case State.BACKOFF:
            slot = _back_off(slot, event, now, random.random() if jitter is None else jitter)
        case State.STOPPING:
            again = event is Event.STALLED or (slot.again and event in (Event.OVERDUE, Event.HEARD))
            silent = event is Event.STALLED or (slot.silent and event is Event.OVERDUE)
            timer = _kill_time(slot, event, now, grace)
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


def refine_event(slot: Slot, event: Event, now: float, fleet: FleetState) -> Event:
    """Narrow the end of a process down by the history of its slot and by the state of the fleet."""
    if event not in (Event.LEFT, Event.DIED, *FAILURES):
        return event
    stalled = slot.state is State.STOPPING and slot.again
    if slot.state is State.STOPPING and not stalled:
        return event
    booting = slot.ready_since is None
    if slot.trial and (stalled or event is not Event.LEFT):
        return Event.UNFIT
    if booting and not slot.was_ready and (stalled or event is Event.DIED) and slot.deaths + 1 >= BOOT_TRIES:
        return Event.HOPELESS
    if stalled:
        return Event.ENDED
    if event not in FAILURES or (event is Event.REFUSED and _may_be_temporary(slot, now, fleet)):
        return event
    return Event.DIED if booting and slot.was_ready and fleet.others_work else Event.FAILED


def _may_be_temporary(slot: Slot, now: float, fleet: FleetState) -> bool:
    """Tell if a slot that the database refuses starts again."""
    since = now if slot.refused_since is None or _is_healthy(slot, now) else slot.refused_since
    return (slot.was_ready or fleet.was_ready) and now - since < REFUSAL_PATIENCE


def _is_healthy(slot: Slot, now: float) -> bool:
    """Tell if the slot was ready for long enough to reset its backoff."""
    return slot.ready_since is not None and now - slot.ready_since >= HEALTHY_AFTER


def classify_exit(state: State, code: int, reason: str | None) -> Event:
    """Classify the end of a process by its exit code (negative: the signal) and the reason that it sent, if any.

    Our exit codes count only with a reason, since user code can end a process with the same codes. A drain counts only
    in STOPPING: a SIGTERM from elsewhere is a death.
    """
    if reason is None or (reason == "drained" and state is not State.STOPPING):
        return Event.DIED
    if reason != "failed":
        if code == ExitCode.BOOT:  # the lifespan failed at its end, and would fail again in a successor
            return Event.FAILED if reason == "burst" and state is State.READY else Event.LEFT
        return Event.LEFT if code == ExitCode.OK else Event.DIED
    if code == ExitCode.DATABASE:
        return Event.REFUSED
    if code == ExitCode.APP:
        return Event.FAILED
    return Event.FAILED if code == ExitCode.BOOT and state is State.STARTING else Event.DIED


def backoff_delay(deaths: int, jitter: float, maximum: float = MAX_BACKOFF) -> float:
    """Return the seconds before the next start after `deaths` in a row: half of the full delay at least."""
    return exponential_delay(INITIAL_BACKOFF, maximum, deaths) * (1.0 - jitter / 2)


def _back_off(slot: Slot, event: Event, now: float, jitter: float) -> Slot:
    healthy = _is_healthy(slot, now)
    deaths = 1 if healthy else slot.deaths + 1
    maximum = MAX_BACKOFF if slot.ready_since is None and event is not Event.REFUSED else MAX_BACKOFF_READY
    refused_since = None if healthy else slot.refused_since
    if event is Event.REFUSED and refused_since is None:
        refused_since = now
    timer = now + backoff_delay(deaths, jitter, maximum)
    return Slot(State.BACKOFF, timer, deaths, was_ready=slot.was_ready, refused_since=refused_since)


def _kill_time(slot: Slot, event: Event, now: float, grace: float) -> float | None:
    """Return the time to kill a stopping child. A second stop can only bring it nearer."""
    if event is Event.OVERDUE:
        return None
    if event is Event.HEARD:
        return now + grace + STOP_MARGIN if slot.silent and slot.timer is not None else slot.timer
    if event is Event.STOP:
        return slot.timer if slot.state is State.STOPPING else now + grace + STOP_MARGIN
    deadline = now + STOP_MARGIN
    return min(slot.timer, deadline) if slot.state is State.STOPPING and slot.timer is not None else deadline
