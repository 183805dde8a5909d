"""The oracle: the work of `pgtask/_fastpath.pyx` in plain Python, slow and obvious.

Invariant: nothing here is shipped, and nothing comes from the compiled module. Where a step must behave as an asyncio
Task, the oracle runs each step in a Task of its own, so that the running Python decides what is right.
"""

from __future__ import annotations

import asyncio
import contextvars
import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from datetime import datetime
from typing import Any, Literal
from uuid import UUID

import msgspec

from pgtask.app import App, StepDefinition
from pgtask.errors import DecodeError, OutcomeError, StepTimeout, UnknownStepError
from pgtask.outcome import Done, Enqueue, Fail, Next
from pgtask.task import Context, Task

MAX_TRANSITIONS = 100
MAX_INTERRUPTIONS = 5
_SPACE = " \t\n\r"


# --- envelope -----------------------------------------------------------------------------------------------------


class Members(list[tuple[str, Any]]):
    """A JSON object with its members in order, also several of one name."""


def parse(text: str) -> Any:
    """Parse JSON as RFC 8259 has it, objects as `Members`, numbers as their text. Raises `DecodeError`."""

    def refuse(constant: str) -> Any:
        raise DecodeError(f"{constant} is not JSON")

    try:
        value = json.loads(text, object_pairs_hook=Members, parse_int=str, parse_float=str, parse_constant=refuse)
        json.dumps(value, ensure_ascii=False).encode()  # a lone surrogate is not text
    except (ValueError, RecursionError) as error:
        raise DecodeError(str(error)) from None
    return value


def scan_envelope(text: str) -> tuple[str, str, bytes]:
    """Return the names and the payload of `{"Task":{"Step":payload}}`. Raises `DecodeError`."""
    task, rest = _only_member(text)
    step, payload = _only_member(rest)
    return task, step, payload.encode()


def _only_member(text: str) -> tuple[str, str]:
    """Return the name of the only member of an object, and its value as it is written."""
    members = parse(text)
    if not isinstance(members, Members) or len(members) != 1:
        raise DecodeError("not an object with one member")
    inside = text.strip(_SPACE)[1:-1].strip(_SPACE)
    name, end = json.JSONDecoder().raw_decode(inside)
    value = inside[end:].lstrip(_SPACE).removeprefix(":")
    return name, value.strip(_SPACE)


# --- codec and table ----------------------------------------------------------------------------------------------


def encode(definition: StepDefinition, step: Task) -> str:
    """Return the envelope of a step. The text of a UUID or a datetime is msgspec's, here as there."""
    inner: Any
    if not definition.fields:
        inner = None
    elif definition.transparent:
        inner = msgspec.to_builtins(getattr(step, definition.fields[0]), str_keys=True)
    else:
        inner = msgspec.to_builtins(step, str_keys=True)
    return json.dumps({definition.task: {definition.name: inner}}, ensure_ascii=False, separators=(",", ":"))


def decode(definition: StepDefinition, payload: bytes) -> Task:
    """Return the step that a payload holds. Raises `DecodeError`."""
    cls = definition.cls
    parse(payload.decode())
    value = json.loads(payload)
    try:
        if definition.transparent:
            (only,) = msgspec.structs.fields(cls)
            return cls(**{only.name: msgspec.convert(value, only.type, str_keys=True)})
        if not definition.fields and value is None:
            return cls()
        return msgspec.convert(value, cls, str_keys=True)
    except (msgspec.ValidationError, RecursionError) as error:
        raise DecodeError(str(error)) from None


class Table:
    """The dispatch table: from the names in an envelope to the definition of the step."""

    def __init__(self, app: App) -> None:
        self.by_name = {(definition.task, definition.name): definition for definition in app}

    def decode(self, text: str) -> tuple[StepDefinition, Task]:
        """Return the definition and the step of an envelope. Raises `DecodeError` or `UnknownStepError`."""
        task, name, payload = scan_envelope(text)
        if (task, name) not in self.by_name:
            raise UnknownStepError(f"{task}.{name}")
        definition = self.by_name[task, name]
        return definition, decode(definition, payload)


# --- leases -------------------------------------------------------------------------------------------------------


@dataclass
class HeldLease:
    """A row of the lease table."""

    id: UUID
    token: UUID
    renewed: float


class Leases:
    """All leases of a worker, by task id: a dict."""

    def __init__(self) -> None:
        self.by_id: dict[UUID, HeldLease] = {}

    def add_claimed(self, ids: Iterable[UUID], token: UUID, sent: float) -> tuple[list[HeldLease], list[HeldLease]]:
        leases, displaced = [], []
        for id in ids:
            if id in self.by_id:
                displaced.append(self.by_id[id])
            self.by_id[id] = HeldLease(id, token, sent)
            leases.append(self.by_id[id])
        return leases, displaced

    def remove(self, held: HeldLease) -> None:
        if self.by_id.get(held.id) is held:
            del self.by_id[held.id]

    def renewed_before(self, time: float) -> list[HeldLease]:
        return [held for held in self.by_id.values() if held.renewed < time]


# --- outcomes -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class NewTask:
    """A task that an outcome enqueues, all but its id."""

    step: str
    at: datetime | None
    delay: float | None
    queue: str
    priority: int
    key: str | None


@dataclass(frozen=True)
class BufferedOutcome:
    """An outcome in the buffer of the flush."""

    kind: Literal["done", "archived", "continued", "rescheduled"]
    id: UUID
    token: UUID | None = None
    step: str | None = None
    tried: int | None = None
    error: str | None = None
    delay: float = 0.0
    queue: str | None = None
    priority: int | None = None
    claims: int | None = None
    new: tuple[NewTask, ...] = ()


def new_parameters(rows: Iterable[BufferedOutcome]) -> list[list[Any]]:
    """Return the last parameters of flush_enqueue.sql, without the ids: those with keys last, in their order."""
    new = [(row.id, task) for row in rows for task in row.new]
    new = [pair for pair in new if pair[1].key is None] + sorted(
        (pair for pair in new if pair[1].key is not None), key=lambda pair: pair[1].key or ""
    )
    names = ("step", "at", "delay", "queue", "priority", "key")
    return [[id for id, _ in new], *([getattr(task, name) for _, task in new] for name in names)]


def parameters(outcomes: Iterable[BufferedOutcome]) -> tuple[Any, ...]:
    """Return the parameters of flush.sql for these outcomes."""
    rows = list(outcomes)
    done, continued, rescheduled = (
        [row for row in rows if row.kind == kind] for kind in ("done", "continued", "rescheduled")
    )
    return (
        [row.id for row in done],
        [row.token for row in done],
        [row.id for row in continued],
        [row.token for row in continued],
        [row.step for row in continued],
        0,
        [row.id for row in rescheduled],
        [row.token for row in rescheduled],
        [row.step for row in rescheduled],
        [row.tried for row in rescheduled],
        [row.error for row in rescheduled],
        [row.delay for row in rescheduled],
        [row.queue for row in rescheduled],
        [row.priority for row in rescheduled],
        [row.claims for row in rescheduled],
        any(row.queue is not None or row.priority is not None for row in rescheduled),
    )


# --- dispatch -----------------------------------------------------------------------------------------------------


@dataclass(eq=False)
class TaskLease:
    """A task that the worker holds, for one step after the other."""

    id: UUID
    text: str
    tried: int = 0
    claims: int = 1
    size: int = 0
    state: Literal["ready", "running", "ended", "lost"] = "ready"
    definition: StepDefinition | None = None
    step: Task | None = None
    transitions: int = 0
    timed_out: bool = False
    stopped: bool = False
    task: asyncio.Task[None] | None = None
    timer: asyncio.TimerHandle | None = None

    @property
    def is_open(self) -> bool:
        return self.state in ("ready", "running")


@dataclass(eq=False)
class Dispatcher:
    """A dispatcher that runs each step in a Task of its own, at most `concurrency` at once."""

    app: App
    concurrency: int
    max_step_bytes: int
    describe_error: Callable[[BaseException | str], str]
    wake_pump: Callable[[], None] = lambda: None
    resources: Any = None
    is_interruption: Callable[[BaseException], bool] = lambda error: False
    unknown_delay: float | None = 30.0
    draining: bool = False
    outcomes: list[BufferedOutcome] = field(default_factory=list)
    ready: list[TaskLease] = field(default_factory=list)
    running: int = 0
    interruptions: dict[UUID, int] = field(default_factory=dict)  # in a row

    def __post_init__(self) -> None:
        self.table = Table(self.app)
        self.context = contextvars.copy_context()

    def admit(self, leases: list[TaskLease]) -> None:
        self.ready += leases
        self._start_steps()

    def take_outcomes(self) -> list[BufferedOutcome]:
        outcomes, self.outcomes = self.outcomes, []
        return outcomes

    def start_next_steps(self, leases: list[TaskLease]) -> None:
        for lease in leases:
            if lease.state == "ended":
                lease.state = "ready"
                self.admit([lease])

    def drop_lost(self, lease: TaskLease) -> None:
        lease.state = "lost"
        if lease.task is not None:
            lease.task.cancel()

    def cancel_step(self, lease: TaskLease) -> None:
        if lease.state == "running":
            lease.stopped = True
            if lease.task is not None:
                lease.task.cancel()

    def _start_steps(self) -> None:
        while self.ready and self.running < self.concurrency:
            lease = self.ready.pop(0)
            if lease.state == "ready" and self._prepare_step(lease):
                self.running += 1
                lease.state = "running"
                lease.task = asyncio.create_task(self._run_step(lease), context=self.context.copy())

    def _prepare_step(self, lease: TaskLease) -> bool:
        try:
            if lease.step is None:
                if lease.size:
                    raise DecodeError(f"{lease.size} bytes")
                lease.definition, lease.step = self.table.decode(lease.text)
        except UnknownStepError as error:
            text = self.describe_error(error) if self.unknown_delay is None else None
            self._reschedule(lease, error=text, delay=self.unknown_delay or 0.0)
        except DecodeError as error:
            self._reschedule(lease, error=self.describe_error(error))
        return lease.step is not None

    async def _run_step(self, lease: TaskLease) -> None:
        assert lease.definition is not None
        context = Context(lease.id, lease.tried + 1, None, self.resources)
        timeout = lease.definition.policy.timeout
        if timeout is not None:
            lease.timer = asyncio.get_running_loop().call_later(timeout.total_seconds(), self._time_out, lease)
        outcome: Any = None
        error: BaseException | None = None
        try:
            outcome = await lease.definition.cls.run(lease.step, context)  # type: ignore[attr-defined]
        except BaseException as raised:
            error = raised
        if lease.timer is not None:
            lease.timer.cancel()
        lease.task = lease.timer = None
        self.running -= 1
        self._finish_step(lease, outcome, error)
        self._start_steps()

    def _time_out(self, lease: TaskLease) -> None:
        if lease.state == "running" and lease.task is not None:
            lease.timed_out = True
            lease.task.cancel()

    def _finish_step(self, lease: TaskLease, outcome: Any, error: BaseException | None) -> None:
        timed_out, lease.timed_out = lease.timed_out, False
        if lease.state == "lost":
            return
        if isinstance(error, asyncio.CancelledError):
            error = StepTimeout("too long") if timed_out else OutcomeError("was cancelled from within")
        if error is not None:
            self._fail_try(lease, error)
        elif type(outcome) in (Done, Next):
            try:
                new = tuple(self._new_task(item) for item in list(outcome.enqueue))
                if type(outcome) is Next:
                    self._continue_with(lease, outcome)
                else:
                    self._add_outcome(lease, BufferedOutcome("done", lease.id))
            except Exception as wrong:
                self._fail_try(lease, wrong)
            else:
                self.outcomes[-1] = replace(self.outcomes[-1], new=new)
        elif type(outcome) is Fail and isinstance(outcome.reason, str):
            self._park_task(lease, outcome.reason)
        else:
            self._fail_try(lease, OutcomeError(f"returned a {type(outcome).__name__}"))

    def _continue_with(self, lease: TaskLease, outcome: Next[Any]) -> None:
        now = lease.definition
        assert now is not None
        if type(outcome.step) not in now.edges:
            raise OutcomeError("undeclared")
        then = self.app.steps[type(outcome.step)]
        try:
            text = encode(then, outcome.step)
            _, _, payload = scan_envelope(text)
            step = decode(then, payload)
        except Exception as error:
            raise OutcomeError("cannot be stored") from error
        if len(text.encode()) > self.max_step_bytes:
            raise OutcomeError("too large")
        delay = outcome.after.total_seconds() if outcome.after is not None else 0.0
        queue = then.policy.queue if then.policy.queue != now.policy.queue else None
        priority = then.policy.priority if then.policy.priority != now.policy.priority else None
        if delay or queue is not None or priority is not None or self.draining or lease.transitions == MAX_TRANSITIONS:
            self._reschedule(lease, step=text, tried=0, delay=delay, queue=queue, priority=priority)
            return
        lease.definition, lease.step, lease.tried, lease.transitions = then, step, 0, lease.transitions + 1
        lease.claims = 1
        self._add_outcome(lease, BufferedOutcome("continued", lease.id, step=text))

    def _new_task(self, item: Any) -> NewTask:
        """Return a new task, of a step of this app."""
        made = item if isinstance(item, Enqueue) else Enqueue(item)
        then = self.app.steps.get(type(made.step))
        try:
            assert then is not None
            text = encode(then, made.step)
            decode(then, scan_envelope(text)[2])
            assert len(text.encode()) <= self.max_step_bytes
        except Exception as error:
            raise OutcomeError("cannot be enqueued") from error
        delay = None if made.after is None else made.after.total_seconds()
        queue = then.policy.queue if made.queue is None else made.queue
        priority = then.policy.priority if made.priority is None else made.priority
        family = next(iter(msgspec.json.decode(text)))
        key = None if made.key is None else f"{family}/{made.key}"
        return NewTask(text, made.at, delay, queue, priority, key)

    def _fail_try(self, lease: TaskLease, error: BaseException) -> None:
        assert lease.definition is not None
        if lease.stopped:
            lease.state = "ready"
            return
        times = self.interruptions.pop(lease.id, 0)
        if self.is_interruption(error) and times + 1 < MAX_INTERRUPTIONS:
            self.interruptions[lease.id] = times + 1
            self._reschedule(lease, tried=lease.tried, delay=1.0, claims=lease.claims - 1)
            return
        policy = lease.definition.policy
        if lease.tried < policy.retry_limit:
            self._reschedule(lease, tried=lease.tried + 1, delay=policy.delay_before_retry(lease.tried + 1))
        else:
            self._park_task(lease, error)

    def _park_task(self, lease: TaskLease, reason: BaseException | str) -> None:
        self._reschedule(lease, tried=lease.tried + 1, error=self.describe_error(reason))

    def _reschedule(self, lease: TaskLease, **columns: Any) -> None:
        self._add_outcome(lease, replace(BufferedOutcome("rescheduled", lease.id), **columns))

    def _add_outcome(self, lease: TaskLease, outcome: BufferedOutcome) -> None:
        lease.state = "ended"
        self.outcomes.append(outcome)
        self.wake_pump()
