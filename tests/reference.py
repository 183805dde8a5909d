"""The oracle: what `pgtask/_fastpath.pyx` does, in plain Python, slow and obvious.

Invariant: nothing here is shipped, and nothing is taken from the compiled module. Where it matters that a step behaves
as an asyncio Task, the oracle runs each step in a Task of its own, so the running Python says what is right.
"""

from __future__ import annotations

import asyncio
import contextvars
import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from typing import Any, Literal
from uuid import UUID

import msgspec

from pgtask.app import App, StepDefinition
from pgtask.errors import DecodeError, OutcomeError, StepTimeout, UnknownStepError
from pgtask.outcome import Done, Fail, Next
from pgtask.task import Context, Task

MOST_MOVES = 100
MOST_INTERRUPTIONS = 5
_SPACE = " \t\n\r"


# --- envelope -----------------------------------------------------------------------------------------------------


class Members(list[tuple[str, Any]]):
    """A JSON object with its members in order, also those of one name."""


def parse(text: str) -> Any:
    """JSON as RFC 8259 has it, objects as `Members`, numbers as their text. Raises `DecodeError`."""

    def refuse(constant: str) -> Any:
        raise DecodeError(f"{constant} is not JSON")

    try:
        value = json.loads(text, object_pairs_hook=Members, parse_int=str, parse_float=str, parse_constant=refuse)
        json.dumps(value, ensure_ascii=False).encode()  # a lone surrogate is no text
    except (ValueError, RecursionError) as error:
        raise DecodeError(str(error)) from None
    return value


def scan_envelope(text: str) -> tuple[str, str, bytes]:
    """The names and the payload of `{"Task":{"Step":payload}}`. Raises `DecodeError`."""
    task, rest = _only_member(text)
    step, payload = _only_member(rest)
    return task, step, payload.encode()


def _only_member(text: str) -> tuple[str, str]:
    """The one member of an object: its name, and its value as it is written."""
    members = parse(text)
    if not isinstance(members, Members) or len(members) != 1:
        raise DecodeError("not an object with one member")
    inside = text.strip(_SPACE)[1:-1].strip(_SPACE)
    name, end = json.JSONDecoder().raw_decode(inside)
    value = inside[end:].lstrip(_SPACE).removeprefix(":")
    return name, value.strip(_SPACE)


# --- codec and table ----------------------------------------------------------------------------------------------


def encode(definition: StepDefinition, step: Task) -> str:
    """The envelope of a step. What a UUID or a datetime looks like is msgspec's to say, here as there."""
    inner: Any
    if not definition.fields:
        inner = None
    elif definition.transparent:
        inner = msgspec.to_builtins(getattr(step, definition.fields[0]), str_keys=True)
    else:
        inner = msgspec.to_builtins(step, str_keys=True)
    return json.dumps({definition.task: {definition.name: inner}}, ensure_ascii=False, separators=(",", ":"))


def decode(definition: StepDefinition, payload: bytes) -> Task:
    """The step that a payload holds. Raises `DecodeError`."""
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
    """From the names in an envelope to the definition of the step."""

    def __init__(self, app: App) -> None:
        self.by_name = {(definition.task, definition.name): definition for definition in app}

    def decode(self, text: str) -> tuple[StepDefinition, Task]:
        """The definition and the step of an envelope. Raises `DecodeError` or `UnknownStepError`."""
        task, name, payload = scan_envelope(text)
        if (task, name) not in self.by_name:
            raise UnknownStepError(f"{task}.{name}")
        definition = self.by_name[task, name]
        return definition, decode(definition, payload)


# --- leases -------------------------------------------------------------------------------------------------------


@dataclass
class Held:
    """What the lease table knows of a lease."""

    id: UUID
    token: UUID
    renewed: float


class LeaseTable:
    """All leases of a worker, by task id: a dict."""

    def __init__(self) -> None:
        self.by_id: dict[UUID, Held] = {}

    def claimed(self, ids: Iterable[UUID], token: UUID, sent: float) -> tuple[list[Held], list[Held]]:
        leases, displaced = [], []
        for id in ids:
            if id in self.by_id:
                displaced.append(self.by_id[id])
            self.by_id[id] = Held(id, token, sent)
            leases.append(self.by_id[id])
        return leases, displaced

    def remove(self, held: Held) -> None:
        if self.by_id.get(held.id) is held:
            del self.by_id[held.id]

    def due(self, before: float) -> list[Held]:
        return [held for held in self.by_id.values() if held.renewed < before]


# --- outcomes -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Entry:
    """An outcome in the buffer of the flush."""

    kind: Literal["done", "kept", "moved"]
    id: UUID
    token: UUID | None = None
    step: str | None = None
    tried: int | None = None
    error: str | None = None
    delay: float = 0.0
    queue: str | None = None
    priority: int | None = None
    claims: int | None = None


def parameters(entries: Iterable[Entry]) -> tuple[Any, ...]:
    """The parameters of flush.sql for these outcomes."""
    entries = list(entries)
    done, kept, moved = ([entry for entry in entries if entry.kind == kind] for kind in ("done", "kept", "moved"))
    return (
        [entry.id for entry in done],
        [entry.token for entry in done],
        [entry.id for entry in kept],
        [entry.token for entry in kept],
        [entry.step for entry in kept],
        [entry.id for entry in moved],
        [entry.token for entry in moved],
        [entry.step for entry in moved],
        [entry.tried for entry in moved],
        [entry.error for entry in moved],
        [entry.delay for entry in moved],
        [entry.queue for entry in moved],
        [entry.priority for entry in moved],
        [entry.claims for entry in moved],
        any(entry.queue is not None or entry.priority is not None for entry in moved),
    )


# --- dispatch -----------------------------------------------------------------------------------------------------


@dataclass(eq=False)
class Lease:
    """A task that is held, for one step after the other."""

    id: UUID
    text: str
    tried: int = 0
    claims: int = 1
    size: int = 0
    state: Literal["ready", "running", "ended", "lost"] = "ready"
    definition: StepDefinition | None = None
    step: Task | None = None
    moves: int = 0
    timed_out: bool = False
    stopped: bool = False
    task: asyncio.Task[None] | None = None
    timer: asyncio.TimerHandle | None = None

    @property
    def is_open(self) -> bool:
        return self.state in ("ready", "running")


@dataclass(eq=False)
class Dispatcher:
    """Runs each step in a Task of its own, at most `concurrency` at once, and gathers what comes of them."""

    app: App
    concurrency: int
    max_step_bytes: int
    describe: Callable[[BaseException | str], str]
    wake: Callable[[], None] = lambda: None
    resources: Any = None
    interrupted: Callable[[BaseException], bool] = lambda error: False
    unknown_delay: float | None = 30.0
    draining: bool = False
    entries: list[Entry] = field(default_factory=list)
    ready: list[Lease] = field(default_factory=list)
    running: int = 0
    interruptions: dict[UUID, int] = field(default_factory=dict)  # in a row

    def __post_init__(self) -> None:
        self.table = Table(self.app)
        self.context = contextvars.copy_context()

    def admit(self, leases: list[Lease]) -> None:
        self.ready += leases
        self._start()

    def take(self) -> list[Entry]:
        entries, self.entries = self.entries, []
        return entries

    def go_on(self, leases: list[Lease]) -> None:
        for lease in leases:
            if lease.state == "ended":
                lease.state = "ready"
                self.admit([lease])

    def lose(self, lease: Lease) -> None:
        lease.state = "lost"
        if lease.task is not None:
            lease.task.cancel()

    def stop(self, lease: Lease) -> None:
        if lease.state == "running":
            lease.stopped = True
            if lease.task is not None:
                lease.task.cancel()

    def _start(self) -> None:
        while self.ready and self.running < self.concurrency:
            lease = self.ready.pop(0)
            if lease.state == "ready" and self._decode(lease):
                self.running += 1
                lease.state = "running"
                lease.task = asyncio.create_task(self._run(lease), context=self.context.copy())

    def _decode(self, lease: Lease) -> bool:
        try:
            if lease.step is None:
                if lease.size:
                    raise DecodeError(f"{lease.size} bytes")
                lease.definition, lease.step = self.table.decode(lease.text)
        except UnknownStepError as error:
            text = self.describe(error) if self.unknown_delay is None else None
            self._move(lease, error=text, delay=self.unknown_delay or 0.0)
        except DecodeError as error:
            self._move(lease, error=self.describe(error))
        return lease.step is not None

    async def _run(self, lease: Lease) -> None:
        assert lease.definition is not None
        context = Context(lease.id, lease.tried + 1, None, self.resources)
        timeout = lease.definition.policy.timeout
        if timeout is not None:
            lease.timer = asyncio.get_running_loop().call_later(timeout.total_seconds(), self._expire, lease)
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
        self._conclude(lease, outcome, error)
        self._start()

    def _expire(self, lease: Lease) -> None:
        if lease.state == "running" and lease.task is not None:
            lease.timed_out = True
            lease.task.cancel()

    def _conclude(self, lease: Lease, outcome: Any, error: BaseException | None) -> None:
        timed_out, lease.timed_out = lease.timed_out, False
        if lease.state == "lost":
            return
        if isinstance(error, asyncio.CancelledError):
            error = StepTimeout("too long") if timed_out else OutcomeError("was cancelled from within")
        if error is not None:
            self._fail(lease, error)
        elif type(outcome) is Done:
            self._put(lease, Entry("done", lease.id))
        elif type(outcome) is Next:
            try:
                self._go_to(lease, outcome)
            except OutcomeError as wrong:
                self._fail(lease, wrong)
        elif type(outcome) is Fail and isinstance(outcome.reason, str):
            self._park(lease, outcome.reason)
        else:
            self._fail(lease, OutcomeError(f"returned a {type(outcome).__name__}"))

    def _go_to(self, lease: Lease, outcome: Next[Any]) -> None:
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
        if delay or queue is not None or priority is not None or self.draining or lease.moves == MOST_MOVES:
            self._move(lease, step=text, tried=0, delay=delay, queue=queue, priority=priority)
            return
        lease.definition, lease.step, lease.tried, lease.moves = then, step, 0, lease.moves + 1
        lease.claims = 1
        self._put(lease, Entry("kept", lease.id, step=text))

    def _fail(self, lease: Lease, error: BaseException) -> None:
        assert lease.definition is not None
        if lease.stopped:
            lease.state = "ready"
            return
        times = self.interruptions.pop(lease.id, 0)
        if self.interrupted(error) and times + 1 < MOST_INTERRUPTIONS:
            self.interruptions[lease.id] = times + 1
            self._move(lease, delay=1.0, claims=lease.claims - 1)
            return
        policy = lease.definition.policy
        if lease.tried < policy.retry_limit:
            self._move(lease, tried=lease.tried + 1, delay=policy.delay_before_retry(lease.tried + 1))
        else:
            self._park(lease, error)

    def _park(self, lease: Lease, reason: BaseException | str) -> None:
        self._move(lease, tried=lease.tried + 1, error=self.describe(reason))

    def _move(self, lease: Lease, **columns: Any) -> None:
        self._put(lease, replace(Entry("moved", lease.id), **columns))

    def _put(self, lease: Lease, entry: Entry) -> None:
        lease.state = "ended"
        self.entries.append(entry)
        self.wake()
