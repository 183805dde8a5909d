# cython: language_level=3, freethreading_compatible=False
"""The compiled hot path: what is done once per task, and nothing else.

In the order of a row's way: `Codec` and `Table` (envelope to step and back), `Lease` and `Leases` (what this worker
holds), `Marks` (what it executes, for whoever buries it), `Dispatcher` and `Runner` (driving steps), `Outcomes` (the
buffer of the flush), `CopyRows` (bulk enqueue).

Invariants:
- A lease is in `Leases` from its claim until its outcome is in the database, was found lost, or it was given back.
- Every lease that starts ends in `Outcomes` exactly once, or is lost.
- A step is marked from before its first line until after its last, wherever it runs; that of a suspect until its outcome
  is in the database.
- All methods are called on the worker's loop, except those of `Leases` marked as safe for the renewing thread.
"""

cimport cython
from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize
from cpython.object cimport PyObject
from cpython.ref cimport Py_DECREF
from libc.string cimport memcpy

import asyncio
import collections.abc
import contextvars
import struct
import time
from collections import deque
from weakref import getweakrefcount

import msgspec

from pgtask.errors import DecodeError, DefinitionError, OutcomeError, StepTimeout, UnknownStepError
from pgtask.outcome import Done, Fail, Next
from pgtask.task import Context

cdef extern from "Python.h":
    ctypedef enum PySendResult:
        PYGEN_RETURN
        PYGEN_ERROR
        PYGEN_NEXT
    PySendResult PyIter_Send(object, object, PyObject**) except PYGEN_ERROR
    const char* PyUnicode_AsUTF8AndSize(object, Py_ssize_t*) except NULL
    Py_ssize_t Py_REFCNT(PyObject*)
    object PyContext_Copy(object)
    int PyContext_Enter(object) except -1
    int PyContext_Exit(object) except -1

cdef object CancelledError = asyncio.CancelledError


cdef str shown(thing):
    """A short `repr`, also of a thing whose own fails."""
    try:
        return repr(thing)[:100]
    except BaseException:
        return f"a {type(thing).__name__}"


cdef object monotonic = time.monotonic
cdef object encoder = msgspec.json.Encoder()


# --- decode -------------------------------------------------------------------------------------------------------


cdef struct Span:
    Py_ssize_t start
    Py_ssize_t end


cdef inline Py_ssize_t skip_space(const char* text, Py_ssize_t at, Py_ssize_t size) noexcept nogil:
    while at < size and text[at] in (32, 9, 10, 13):
        at += 1
    return at


cdef Py_ssize_t scan_name(const char* text, Py_ssize_t at, Py_ssize_t size, Span* name) noexcept nogil:
    """Read `{ "name" :` from `at`; where its value begins, -1 if it is not there, -2 if the name has an escape."""
    at = skip_space(text, at, size)
    if at >= size or text[at] != c"{":
        return -1
    at = skip_space(text, at + 1, size)
    if at >= size or text[at] != c'"':
        return -1
    name.start = at + 1
    at += 1
    while at < size and text[at] != c'"':
        if text[at] == c"\\":
            return -2
        at += 1
    name.end = at
    at = skip_space(text, at + 1, size)
    if at >= size or text[at] != c":":
        return -1
    return skip_space(text, at + 1, size)


cdef int scan(const char* text, Py_ssize_t size, Span* task, Span* step, Span* payload) noexcept nogil:
    """Find the two names and the payload of `{"Task":{"Step":payload}}` without building anything; 0 when found."""
    cdef Py_ssize_t at = scan_name(text, 0, size, task)
    if at < 0:
        return <int>at
    at = scan_name(text, at, size, step)
    if at < 0:
        return <int>at
    payload.start = at
    cdef Py_ssize_t end = size
    cdef int closing
    for closing in range(2):
        while end > at and text[end - 1] in (32, 9, 10, 13):
            end -= 1
        if end <= at or text[end - 1] != c"}":
            return -1
        end -= 1
    while end > at and text[end - 1] in (32, 9, 10, 13):
        end -= 1
    if end <= at:
        return -1
    payload.end = end
    return 0


def scan_envelope(str text):
    """The task's name, the step's name and the payload (bytes) of an envelope. Raises `DecodeError`.

    The payload is not yet known to be valid JSON: decoding it says so.
    """
    cdef Py_ssize_t size
    cdef const char* raw = PyUnicode_AsUTF8AndSize(text, &size)
    cdef Span task, step, payload
    cdef int found = scan(raw, size, &task, &step, &payload)
    if found == 0:
        return (
            raw[task.start:task.end].decode(),
            raw[step.start:step.end].decode(),
            raw[payload.start:payload.end],
        )
    return scan_slowly(text)


cdef object _outer = msgspec.json.Decoder(dict[str, msgspec.Raw])


def scan_slowly(str text):
    """As `scan_envelope`, by a full parse: for names with escapes, and to say what is wrong with a bad envelope."""
    try:
        outer = _outer.decode(text)
        if len(outer) == 1:
            (task, rest), = outer.items()
            inner = _outer.decode(rest)
            if len(inner) == 1:
                (step, payload), = inner.items()
                return task, step, bytes(payload)
    except msgspec.ValidationError:
        pass
    except (msgspec.DecodeError, RecursionError) as error:
        raise DecodeError(f"the step is not valid JSON: {error}") from None
    raise DecodeError('the step is not of the form {"Task":{"Step":{...}}}')


@cython.final
cdef class Codec:
    """One step class and its JSON: `{"Task":{"Step":payload}}`, as serde writes it.

    A class without fields is `null` inside (`{}` is read too); a transparent one is its field's bare value.
    """

    cdef readonly object cls
    cdef readonly str label
    cdef readonly bytes prefix
    cdef object decoder
    cdef str only_field
    cdef bint is_unit

    def __init__(self, cls, str task, str step, bint transparent):
        fields = cls.__struct_fields__
        if transparent and len(fields) != 1:
            raise DefinitionError(f"step {task}.{step}: transparent = True needs exactly one field, it has {len(fields)}")
        self.cls = cls
        self.label = f"{task}.{step}"
        self.prefix = b'{%b:{%b:' % (encoder.encode(task), encoder.encode(step))
        self.is_unit = not fields
        self.only_field = fields[0] if transparent else None
        if transparent:
            self.decoder = msgspec.json.Decoder(msgspec.structs.fields(cls)[0].type)
        else:
            self.decoder = msgspec.json.Decoder(cls)

    cpdef object decode(self, bytes payload):
        """The step that a payload holds. Raises `DecodeError` with msgspec's message."""
        try:
            if self.only_field is not None:
                return self.cls(**{self.only_field: self.decoder.decode(payload)})
            if self.is_unit and payload == b"null":
                return self.cls()
            return self.decoder.decode(payload)
        except Exception as error:
            raise DecodeError(f"{self.label} cannot be decoded: {error or type(error).__name__}") from None

    cpdef bytes payload(self, step):
        """The JSON of a step without its envelope. Raises what msgspec raises for a value it cannot encode."""
        if self.is_unit:
            return b"null"
        if self.only_field is not None:
            return encoder.encode(getattr(step, self.only_field))
        return encoder.encode(step)

    def encode(self, step):
        """The envelope of a step, as text."""
        return (self.prefix + self.payload(step) + b"}}").decode()


@cython.final
cdef class Entry:
    """A row of the dispatch table: what the engine needs of a step definition, once per worker."""

    cdef readonly Codec codec
    cdef readonly object policy
    cdef readonly frozenset edges
    cdef readonly str queue
    cdef readonly int priority
    cdef public object run
    cdef bint is_async
    cdef readonly double timeout  # seconds; 0 is none
    cdef readonly bint archive

    def __init__(self, definition):
        self.codec = Codec(definition.cls, definition.task, definition.name, definition.transparent)
        self.policy = definition.policy
        self.edges = frozenset(definition.edges)
        self.queue = definition.policy.queue
        self.priority = definition.policy.priority
        self.run = getattr(definition.cls, "run", None)  # a workflow's is set by the worker
        self.is_async = definition.is_async
        self.archive = definition.archive
        timeout = definition.policy.timeout
        self.timeout = 0 if timeout is None else timeout.total_seconds()


@cython.final
cdef class Table:
    """The dispatch table: from the names in an envelope, and from a step's class, to its `Entry`."""

    cdef dict by_name
    cdef dict by_class
    cdef bytes payload

    def __init__(self, definitions):
        self.by_name = {}
        self.by_class = {}
        for definition in definitions:
            entry = Entry(definition)
            self.by_name[b"%b\0%b" % (definition.task.encode(), definition.name.encode())] = entry
            self.by_class[definition.cls] = entry

    def entry(self, cls):
        return self.by_class[cls]

    cdef Entry find(self, str text):
        """The entry that an envelope names; its payload is left in `self.payload`."""
        cdef Py_ssize_t size
        cdef const char* raw = PyUnicode_AsUTF8AndSize(text, &size)
        cdef Span task, step, rest
        cdef bytes key
        cdef char* into
        if scan(raw, size, &task, &step, &rest) == 0:
            key = PyBytes_FromStringAndSize(NULL, task.end - task.start + 1 + step.end - step.start)
            into = PyBytes_AS_STRING(key)
            memcpy(into, raw + task.start, task.end - task.start)
            into[task.end - task.start] = 0
            memcpy(into + task.end - task.start + 1, raw + step.start, step.end - step.start)
            self.payload = PyBytes_FromStringAndSize(raw + rest.start, rest.end - rest.start)
            entry = self.by_name.get(key)
            if entry is not None:
                return <Entry>entry
        # Rare: a name with an escape, a step of another app, or a text that only looked like an envelope.
        names = scan_slowly(text)
        self.payload = names[2]
        entry = self.by_name.get(b"%b\0%b" % (names[0].encode(), names[1].encode()))
        if entry is None:
            raise UnknownStepError(f"{names[0]}.{names[1]}")
        return <Entry>entry

    def decode(self, str text):
        """The entry and the step of an envelope. Raises `DecodeError` or `UnknownStepError`."""
        cdef Entry entry = self.find(text)
        try:
            return entry, entry.codec.decode(self.payload)
        except DecodeError:
            scan_slowly(text)  # a broken envelope is named as such, not as a wrong payload
            raise


# --- leases -------------------------------------------------------------------------------------------------------

cdef enum:
    READY  # claimed, waits for its turn
    RUNNING
    ENDED  # its outcome is in the buffer
    LOST  # somebody else may have it: nothing that comes of it is written

cdef enum Reason:
    NOTHING
    TIMEOUT
    STOP


@cython.final
cdef class Lease:
    """A task that this worker holds, for one step after the other, under one token."""

    cdef readonly object id
    cdef readonly object token
    cdef readonly int tried  # failed tries of the current step
    cdef readonly int claims  # claims of the current step without an outcome, this one included
    cdef readonly Entry entry  # None until the step is decoded
    cdef str text  # the envelope, until it is decoded
    cdef readonly object step
    cdef readonly int size  # bytes of a step too large to be sent, else 0
    cdef int moves  # steps gone on to under this lease
    cdef readonly double renewed  # monotonic seconds at which the last claim or renewal was sent
    cdef int state
    cdef Reason reason  # why its step is being cancelled
    cdef object task  # the asyncio Task of a suspended step
    cdef object timer
    cdef Py_ssize_t mark  # where in `Marks` its step is marked beside the one that has the loop; else 0

    def __repr__(self):
        return f"<Lease {self.id} {self.label}>"

    @property
    def label(self):
        return "(not decoded)" if self.entry is None else self.entry.codec.label

    @property
    def is_running(self):
        return self.state == RUNNING

    def clear(self):
        """Its step has got on under this claim: what came of the claims before does not count any more."""
        self.claims = 1

    @property
    def is_open(self):
        """Waiting for its turn or running: no outcome yet."""
        return self.state == READY or self.state == RUNNING


@cython.final
cdef class Leases:
    """All leases of this worker, by task id."""

    cdef dict by_id
    cdef list suspects

    def __init__(self):
        self.by_id = {}
        self.suspects = []

    def __len__(self):
        return len(self.by_id)

    def claimed(self, list rows, token, double sent):
        """Enter claimed rows (id, step, tried, claims, size, ...); returns the new leases, and those of ours they displaced.

        A task that is claimed here while an older lease of it is still in the table was lost in between.
        """
        cdef Lease lease
        cdef list leases = [], displaced = []
        for row in rows:
            lease = Lease.__new__(Lease)
            lease.id = row[0]
            lease.token = token
            lease.text = row[1]
            lease.tried = row[2]
            lease.claims = row[3]
            lease.size = row[4] or 0
            lease.renewed = sent
            older = self.by_id.get(lease.id)
            if older is not None:
                displaced.append(older)
            self.by_id[lease.id] = lease
            leases.append(lease)
            if lease.claims > 1:
                self.suspects.append(lease)
        return leases, displaced

    def take_suspects(self):
        """The leases entered since the last call that had a claim without an outcome before this one."""
        suspects = self.suspects
        if suspects:
            self.suspects = []
        return suspects

    cpdef void remove(self, Lease lease):
        if self.by_id.get(lease.id) is lease:
            del self.by_id[lease.id]

    def remove_all(self, list leases):
        cdef Lease lease
        for lease in leases:
            self.remove(lease)

    def get(self, id):
        return self.by_id.get(id)

    def due(self, double before):
        """Leases last renewed before that time. Safe for the renewing thread."""
        cdef Lease lease
        return [lease for lease in list(self.by_id.values()) if lease.renewed < before]

    def renewed(self, list leases, double sent):
        """Those leases hold from `sent` on. Safe for the renewing thread."""
        cdef Lease lease
        for lease in leases:
            lease.renewed = sent

    def open(self):
        """The leases without an outcome yet: waiting for their turn, or running."""
        cdef Lease lease
        return [lease for lease in self.by_id.values() if lease.is_open]


# --- marks --------------------------------------------------------------------------------------------------------


cdef struct Mark:
    unsigned char id[16]
    unsigned long long number  # counts the steps of this process from 1; 0: the mark is free


@cython.final
cdef class Marks:
    """The ids of the tasks whose steps are executing, in memory that outlives the process which writes it.

    `memory` is a writable buffer of zeros, `Marks.size(n)` bytes for n suspended steps and suspects not yet written; an
    anonymous shared `mmap` made before a fork can be read by the parent when the child is dead. The first mark is that
    of the step which has the loop; one that suspends, or is given to a thread, gets a mark of its own. The number is
    written last and cleared first, so that a process that dies in between leaves no half of an id. The first mark keeps
    its id without a number: of the step that began or ended last.
    """

    cdef Mark* marks
    cdef object memory  # keeps it alive
    cdef list free
    cdef unsigned long long number

    def __init__(self, memory):
        cdef unsigned char[::1] view = memory
        self.memory = view
        self.marks = <Mark*>&view[0]
        self.free = list(range(view.shape[0] // <Py_ssize_t>sizeof(Mark) - 1, 0, -1))

    @staticmethod
    def size(Py_ssize_t suspended):
        return (suspended + 1) * sizeof(Mark)

    cdef inline void write(self, volatile Mark* mark, bytes id) noexcept:
        self.number += 1
        memcpy(<char*>mark.id, PyBytes_AS_STRING(id), 16)
        mark.number = self.number

    cdef inline void begin(self, Lease lease) except *:
        """A step gets the loop for the first time."""
        self.write(&self.marks[0], <bytes>lease.id.bytes)

    cdef inline void pause(self) noexcept:
        """That step has ended, or goes on with a mark of its own."""
        (<volatile Mark*>&self.marks[0]).number = 0

    cdef void keep(self, Lease lease) except *:
        """A step goes on beside others."""
        cdef bytes id = lease.id.bytes
        if not lease.mark and self.free:  # always, unless more are suspended than was said
            lease.mark = self.free.pop()
        if lease.mark:
            self.write(&self.marks[lease.mark], id)
        memcpy(self.marks[0].id, PyBytes_AS_STRING(id), 16)

    cdef void end(self, Lease lease) except *:
        """That step has ended."""
        if lease.mark:
            memcpy(self.marks[0].id, self.marks[lease.mark].id, 16)
            self.forget(lease)

    cdef void forget(self, Lease lease) except *:
        if lease.mark:
            (<volatile Mark*>&self.marks[lease.mark]).number = 0
            self.free.append(lease.mark)
            lease.mark = 0

    def charged(self):
        """The ids of those that may have killed the process: what executes, and what began or ended last. What that one
        has left behind, a callback or a thread, may outlive it; if its outcome is in the database, it is beyond
        charging."""
        last = bytes(self.marks[0].id[:16])
        return list(dict.fromkeys([*self.executing(), *([last] if any(last) else [])]))

    def executing(self):
        """The ids (16 bytes each) that are marked, those that began first at the head."""
        cdef Py_ssize_t at, marks = len(self.memory) // sizeof(Mark)
        found = [
            (self.marks[at].number, self.marks[at].id[:16]) for at in range(marks) if self.marks[at].number
        ]
        return list(dict.fromkeys(id for _, id in sorted(found)))


# --- outcomes -----------------------------------------------------------------------------------------------------


@cython.final
cdef class Outcomes:
    """The buffer of the flush: parallel lists, as the parameters of flush.sql want them.

    `done`, `archived`, `kept` and `moved` are the leases; kept tasks go on under their lease, moved ones leave this
    worker. Archived ones are done too, and have a statement of their own: archive.sql.
    """

    cdef readonly list done, done_ids, done_tokens
    cdef readonly list archived, archived_ids, archived_tokens
    cdef readonly list kept, kept_ids, kept_tokens, kept_steps
    cdef readonly list moved, moved_ids, moved_tokens, moved_steps, moved_tried, moved_errors, moved_delays
    cdef readonly list moved_queues, moved_priorities, moved_claims
    cdef readonly bint notify  # a task moved to another lane: its workers may be idle

    def __init__(self):
        self.done, self.done_ids, self.done_tokens = [], [], []
        self.archived, self.archived_ids, self.archived_tokens = [], [], []
        self.kept, self.kept_ids, self.kept_tokens, self.kept_steps = [], [], [], []
        self.moved, self.moved_ids, self.moved_tokens = [], [], []
        self.moved_steps, self.moved_tried, self.moved_errors, self.moved_delays = [], [], [], []
        self.moved_queues, self.moved_priorities, self.moved_claims = [], [], []
        self.notify = False

    def __len__(self):
        return len(self.done) + len(self.archived) + len(self.kept) + len(self.moved)

    cpdef void add_done(self, Lease lease):
        self.done.append(lease)
        self.done_ids.append(lease.id)
        self.done_tokens.append(lease.token)

    cpdef void add_archived(self, Lease lease):
        self.archived.append(lease)
        self.archived_ids.append(lease.id)
        self.archived_tokens.append(lease.token)

    cpdef void add_kept(self, Lease lease, str step):
        self.kept.append(lease)
        self.kept_ids.append(lease.id)
        self.kept_tokens.append(lease.token)
        self.kept_steps.append(step)

    cpdef void add_moved(self, Lease lease, step, tried, error, delay, queue=None, priority=None, claims=None):
        self.moved.append(lease)
        self.moved_ids.append(lease.id)
        self.moved_tokens.append(lease.token)
        self.moved_steps.append(step)
        self.moved_tried.append(tried)
        self.moved_errors.append(error)
        self.moved_delays.append(delay)
        self.moved_queues.append(queue)
        self.moved_priorities.append(priority)
        self.moved_claims.append(claims)
        if queue is not None or priority is not None:
            self.notify = True

    @property
    def statement(self):
        """What writes it. Those to be archived have to be alone."""
        return "archive" if self.archived else "flush"

    def parameters(self):
        """The parameters of that statement, in order."""
        if self.archived:
            return self.archived_ids, self.archived_tokens
        return (
            self.done_ids, self.done_tokens,
            self.kept_ids, self.kept_tokens, self.kept_steps,
            self.moved_ids, self.moved_tokens, self.moved_steps, self.moved_tried, self.moved_errors,
            self.moved_delays, self.moved_queues, self.moved_priorities, self.moved_claims,
            self.notify,
        )

    def ids(self):
        """The tasks that have an outcome here."""
        return self.done_ids + self.archived_ids + self.kept_ids + self.moved_ids

    def take_archived(self):
        """Those to be archived, in a buffer of their own; the others stay."""
        cdef Outcomes taken = Outcomes()
        taken.archived, taken.archived_ids, taken.archived_tokens = (
            self.archived, self.archived_ids, self.archived_tokens
        )
        self.archived, self.archived_ids, self.archived_tokens = [], [], []
        return taken

    def halves(self):
        """The same outcomes in two buffers, to find the one that the database refuses."""
        cdef Outcomes first = Outcomes(), second = Outcomes(), half
        cdef Py_ssize_t at, seen = 0, middle = len(self) // 2
        for at in range(len(self.done)):
            half = first if seen < middle else second
            half.add_done(self.done[at])
            seen += 1
        for at in range(len(self.archived)):
            half = first if seen < middle else second
            half.add_archived(self.archived[at])
            seen += 1
        for at in range(len(self.kept)):
            half = first if seen < middle else second
            half.add_kept(self.kept[at], self.kept_steps[at])
            seen += 1
        for at in range(len(self.moved)):
            half = first if seen < middle else second
            half.add_moved(
                self.moved[at], self.moved_steps[at], self.moved_tried[at], self.moved_errors[at],
                self.moved_delays[at], self.moved_queues[at], self.moved_priorities[at], self.moved_claims[at],
            )
            seen += 1
        return first, second

    def divide(self, set ids):
        """The same outcomes in two buffers: those of the tasks `ids`, and the others."""
        cdef Outcomes first = Outcomes(), second = Outcomes()
        first.extend(self, ids, True)
        second.extend(self, ids, False)
        return first, second

    def extend(self, Outcomes other, set ids, bint among):
        """Add the outcomes of another buffer whose task is, or is not, among `ids`."""
        cdef Py_ssize_t at
        for at in range(len(other.done)):
            if (other.done_ids[at] in ids) == among:
                self.add_done(other.done[at])
        for at in range(len(other.archived)):
            if (other.archived_ids[at] in ids) == among:
                self.add_archived(other.archived[at])
        for at in range(len(other.kept)):
            if (other.kept_ids[at] in ids) == among:
                self.add_kept(other.kept[at], other.kept_steps[at])
        for at in range(len(other.moved)):
            if (other.moved_ids[at] in ids) == among:
                self.add_moved(
                    other.moved[at], other.moved_steps[at], other.moved_tried[at], other.moved_errors[at],
                    other.moved_delays[at], other.moved_queues[at], other.moved_priorities[at], other.moved_claims[at],
                )


@cython.final
cdef class Written:
    """What a handler of the engine's returns when the journal has written the row: nothing is left to do for it."""


@cython.final
cdef class Again:
    """What a handler of the engine's returns to have its step run again after `delay` seconds, as tried so often."""

    cdef readonly double delay
    cdef readonly int tried

    def __init__(self, double delay, int tried):
        self.delay = delay
        self.tried = tried


# --- dispatch -----------------------------------------------------------------------------------------------------

cdef double SLICE = 0.005  # seconds in one turn of the loop after which no further step is started
cdef double INTERRUPTED = 1.0  # seconds until a step is tried again under which the database went away
cdef int MOST_INTERRUPTIONS = 5  # in a row and in this worker: the last one counts as a failed try
cdef int MOST_REMEMBERED = 10_000  # tasks of which the interruptions are known
cdef int MOST_MOVES = 100  # transitions under one lease, then the task queues up again behind the others


cdef class Dispatcher:
    """Runs steps and puts what comes of them into the buffer.

    `admit` takes leases; a `Runner` starts them in order while fewer than `concurrency` are suspended, or fewer still in
    a `hush`. A subclass supplies what is slow or rare: `wake`, `start_thread`, `describe`, `interrupted`, `failed`,
    `parked`, `unknown`, `broke`.
    """

    cdef readonly Table table
    cdef readonly Leases leases
    cdef readonly Outcomes outcomes
    cdef readonly object ready  # deque of leases in state READY
    cdef readonly int suspended  # steps started and not ended
    cdef public bint draining  # tasks that could go on here are moved instead
    cdef public object db
    cdef public object resources
    cdef readonly long long steps  # steps started
    cdef public long long errors  # failed tries, and rows that cannot be decoded
    cdef object loop
    cdef readonly object context  # of who admits: each runner runs in it, each step in a copy of it
    cdef readonly Marks marks
    cdef int concurrency
    cdef int limit  # how many steps may be suspended now
    cdef bint hushed
    cdef list unwritten  # suspects whose step has ended
    cdef dict interruptions  # by task: how often in a row the database went away under its step
    cdef Py_ssize_t max_step_bytes
    cdef int runners  # how many are there to take from `ready`
    cdef int width  # how many there should be: one while steps do not suspend, more while they do
    cdef double until  # monotonic time after which this turn of the loop starts no step; 0: it has started none yet

    def __init__(
        self, loop, Table table, Leases leases, *, int concurrency, Py_ssize_t max_step_bytes, Marks marks=None
    ):
        self.loop = loop
        self.context = contextvars.copy_context()
        self.table = table
        self.leases = leases
        self.outcomes = Outcomes()
        self.ready = deque()
        self.concurrency = self.limit = concurrency
        self.max_step_bytes = max_step_bytes
        self.marks = Marks(bytearray(Marks.size(concurrency))) if marks is None else marks
        self.interruptions = {}
        self.unwritten = []
        self.width = 1

    # What a subclass supplies.

    def wake(self):
        """The buffer is no longer empty, or a slot is free."""

    def start_thread(self, Lease lease, run, context):
        """Call `run(lease.step, context)` in a thread, then `self.end(lease, outcome, error)` on the loop."""
        raise NotImplementedError

    def describe(self, error):
        """The text for the row's `error`."""
        return str(error)

    def interrupted(self, error):
        """Whether a step failed only because its connection to the database was lost."""
        return False

    def failed(self, Lease lease, error, double delay, int tried):
        """The try number `tried` has failed and will be repeated after `delay` seconds."""

    def parked(self, Lease lease, str text):
        """A task was parked."""

    def broke(self, error):
        """The engine itself has failed: the worker cannot go on."""

    def unknown(self, str name):
        """A step is unknown: the seconds after which to try again, or None to park it."""

    # The way of a lease.

    def admit(self, list leases):
        """Take leases in order, to run as soon as there is room."""
        self.context = contextvars.copy_context()
        self.ready.extend(leases)
        self.serve()

    def take(self):
        """Everything in the buffer; it is empty afterwards."""
        outcomes = self.outcomes
        self.outcomes = Outcomes()
        return outcomes

    def take_ready(self):
        """The leases that have not started; nothing is ready afterwards."""
        cdef Lease lease
        ready = [lease for lease in self.ready if lease.state == READY]
        self.ready.clear()
        return ready

    def go_on(self, list leases):
        """Transitions are durable: run the next steps."""
        cdef Lease lease
        cdef list ready = []
        for lease in leases:
            if lease.state == ENDED:
                lease.state = READY
                ready.append(lease)
        if ready:
            self.admit(ready)

    def lose(self, Lease lease):
        """Somebody else may hold this task now: cancel its step and drop what comes of it."""
        self.leases.remove(lease)
        was = lease.state
        lease.state = LOST
        if was == RUNNING and lease.task is not None:
            lease.task.cancel()

    def stop(self, Lease lease):
        """Cancel a running step whose lease is about to be given back."""
        if lease.state == RUNNING:
            lease.reason = STOP
            if lease.task is not None:
                lease.task.cancel()

    def hush(self, int limit):
        """Start steps only while fewer than `limit` are suspended, 0 starts none; and after a suspect no other step but a
        suspect's."""
        self.hushed = True
        self.limit = limit
        self.serve()

    def end_hush(self):
        self.hushed = False
        self.limit = self.concurrency
        self.serve()

    cdef void tried(self, Lease lease) except *:
        """The step of a suspect has ended, but what it left behind may yet kill the process: it stays marked until its
        outcome is in the database."""
        self.marks.keep(lease)
        self.unwritten.append(lease)
        if self.hushed:
            while self.ready and (<Lease>self.ready[0]).state != READY:
                self.ready.popleft()
            if not self.ready or (<Lease>self.ready[0]).claims < 2:
                self.limit = 0

    def unmark_written(self):
        """Let go of the suspects whose outcome is in the database, and of those that were lost."""
        cdef Lease lease
        cdef list unwritten = []
        for lease in self.unwritten:
            if lease.state == ENDED and self.leases.get(lease.id) is lease:
                unwritten.append(lease)
            elif lease.state != RUNNING:  # its next step has the mark now
                self.marks.forget(lease)
        self.unwritten = unwritten

    def start_first(self, Lease lease):
        """Put a lease before all others that wait for their turn."""
        self.ready.appendleft(lease)
        self.serve()

    def put_off(self, Lease lease, double delay):
        """Give a lease back that has not started, for `delay` seconds at least."""
        if lease.state == READY:
            self.move(lease, None, None, None, delay, None, None, lease.claims - 1)

    def convict(self, Lease lease, str what):
        """Park a task that has not started, for what became of its workers. `tried` stays: nothing was tried."""
        if lease.state != READY:
            return
        try:
            lease.entry = self.table.find(lease.text)
            what = f"{lease.label} {what}"
        except Exception:  # it never got so far
            what = f"the task {what}"
        self.refuse(lease, what, None)

    cpdef void serve(self):
        """See to it that runners take from `ready`, if they may.

        A runner whose step suspends is gone, and the next one starts in the next turn of the loop. One alone would so
        start one step in a turn, and steps that all await would never fill the slots.
        """
        cdef Py_ssize_t wanted = min(self.width, len(self.ready), self.limit - self.suspended)
        while self.runners < wanted:
            self.runners += 1
            runner = Runner.__new__(Runner, self)
            (<Runner>runner).task = self.loop.create_task(runner, context=self.context)

    cdef bint has_time(self) except -1:
        """Whether this turn of the loop may start another step: runners share one slice of it."""
        cdef double now = <double>monotonic()
        if self.until == 0.0:
            self.until = now + SLICE
            self.loop.call_soon(self.turn)
        return now <= self.until

    def turn(self):
        """Another turn of the loop."""
        self.until = 0.0

    cdef bint start(self, Lease lease) except -1:
        """Make the step of a lease ready to run; false if its row cannot be run, which is then in the buffer."""
        lease.state = RUNNING
        self.steps += 1
        try:
            if lease.step is None:
                if lease.size:
                    raise DecodeError(
                        f"the step is {lease.size} bytes, more than the {self.max_step_bytes} allowed (--max-step-bytes)"
                    )
                lease.entry, lease.step = self.table.decode(lease.text)
                lease.text = None
        except UnknownStepError as error:
            self.steps -= 1
            self.refuse(lease, error, self.unknown(error.name))
            return False
        except DecodeError as error:
            self.steps -= 1
            self.refuse(lease, error, None)
            return False
        return True

    cdef void refuse(self, Lease lease, error, delay):
        """A row that cannot be run: put it back for `delay` seconds, or park it; `tried` stays, nothing was tried."""
        if delay is not None:
            self.move(lease, None, None, None, delay)
        else:
            self.errors += 1
            text = self.describe(error)
            self.parked(lease, text)
            self.move(lease, None, None, text, 0.0)

    cdef void move(self, Lease lease, step, tried, error, delay, queue=None, priority=None, claims=None):
        lease.state = ENDED
        self.outcomes.add_moved(lease, step, tried, error, delay, queue, priority, claims)
        if len(self.outcomes) == 1:
            self.wake()

    cpdef void end(self, Lease lease, outcome, error):
        """A step has ended with an outcome or an error. For steps that suspended or ran in a thread."""
        self.suspended -= 1
        if lease.claims > 1:
            self.tried(lease)
        else:
            self.marks.end(lease)
        if lease.timer is not None:
            lease.timer.cancel()
            lease.timer = None
        lease.task = None
        self.conclude(lease, outcome, error)
        self.wake()
        self.serve()

    cdef void conclude(self, Lease lease, outcome, error):
        """Turn what a step returned or raised into an entry of the buffer, whatever the objects of the user's do."""
        if lease.state != RUNNING:
            return  # lost, or given up already
        try:
            self.judge(lease, outcome, error)
        except BaseException as broken:
            if lease.state == RUNNING:
                kind = type(error if error is not None else outcome).__name__
                self.errors += 1
                self.move(lease, None, lease.tried + 1, f"a {kind} of {lease.label} raised {type(broken).__name__}", 0.0)

    cdef object judge(self, Lease lease, outcome, error):
        if error is not None:
            self.fail(lease, error)
            return
        if self.interruptions:
            self.interruptions.pop(lease.id, None)
        kind = type(outcome)
        if kind is Done:
            lease.state = ENDED
            if lease.entry.archive:
                self.outcomes.add_archived(lease)
            else:
                self.outcomes.add_done(lease)
            if len(self.outcomes) == 1:
                self.wake()
        elif kind is Next:
            try:
                self.go_to(lease, outcome)
            except OutcomeError as wrong:
                self.fail(lease, wrong)
        elif kind is Written:
            lease.state = ENDED
            self.leases.remove(lease)
        elif kind is Again:
            self.move(lease, None, (<Again>outcome).tried, None, (<Again>outcome).delay)
        elif kind is Fail and isinstance(outcome.reason, str):
            self.park(lease, str(outcome.reason))
        elif kind is Fail:
            self.fail(lease, OutcomeError(f"{lease.label}: Fail() takes a reason as text, not {shown(outcome.reason)}"))
        else:
            what = "returned None: a return is missing" if outcome is None else f"returned {shown(outcome)}"
            self.fail(lease, OutcomeError(f"{lease.label} {what}; return Next(...), Done() or Fail(...)"))

    cdef object go_to(self, Lease lease, outcome):
        """The task goes on with another step: under its lease if it goes on now and here, else by way of the queue."""
        cdef Entry now = lease.entry, then
        step = outcome.step
        if type(step) not in now.edges:
            if isinstance(step, type):
                name = step.__name__
                raise OutcomeError(f"{now.codec.label}: {name} is a class: write Next({name}(...))")
            raise OutcomeError(
                f"{now.codec.label} returned Next({type(step).__name__}), but its annotation allows "
                + (", ".join(sorted(edge.__name__ for edge in now.edges)) or "no next step")
            )
        then = self.table.by_class[type(step)]
        try:
            payload = then.codec.payload(step)
            # What the row will say is what runs, here as on any other worker.
            step = then.codec.decode(payload)
        except DecodeError as error:  # it says all there is to say
            raise OutcomeError(f"the next step {error}") from None
        except Exception as error:
            raise OutcomeError(f"the next step {then.codec.label} cannot be stored: {error}") from error
        payload = then.codec.prefix + payload + b"}}"
        if len(payload) > self.max_step_bytes:
            raise OutcomeError(
                f"the next step {then.codec.label} is {len(payload)} bytes, more than the {self.max_step_bytes} allowed"
            )
        text = payload.decode()
        after = outcome.after
        delay = 0.0 if after is None else after.total_seconds()
        # An override given at enqueue stays; a policy that differs from the last step's moves the row.
        queue = None if then.queue == now.queue else then.queue
        priority = None if then.priority == now.priority else then.priority
        if delay > 0 or queue is not None or priority is not None or self.draining or lease.moves >= MOST_MOVES:
            self.move(lease, text, 0, None, delay, queue, priority)
            return None
        lease.state = ENDED
        lease.moves += 1
        lease.tried = 0
        lease.claims = 1
        lease.reason = NOTHING
        lease.entry = then
        lease.step = step
        self.outcomes.add_kept(lease, text)
        if len(self.outcomes) == 1:
            self.wake()

    cdef void fail(self, Lease lease, error):
        """A try has failed: retry it by its policy, or park the task."""
        if lease.reason == STOP:
            lease.state = READY  # stopped by the operator: not its fault, it is given back as it was
            return
        if isinstance(error, CancelledError):
            if lease.reason == TIMEOUT:
                error = StepTimeout(f"{lease.label} ran longer than its timeout of {lease.entry.timeout:g} s")
            else:
                error = OutcomeError(f"{lease.label} was cancelled from within: it raised CancelledError")
        elif self.interrupted(error) and self.is_excused(lease):
            # The database went away under the step: no verdict on it. Its process lives, so this claim counts no crash.
            self.move(lease, None, None, None, INTERRUPTED, None, None, max(lease.claims - 1, 0))
            return
        self.interruptions.pop(lease.id, None)
        lease.reason = NOTHING
        policy = lease.entry.policy
        if lease.tried < policy.retry_limit:
            self.errors += 1
            delay = policy.delay_before_retry(lease.tried + 1)
            self.failed(lease, error, delay, lease.tried + 1)
            self.move(lease, None, lease.tried + 1, None, delay)
        else:
            self.park(lease, error)

    cdef bint is_excused(self, Lease lease) except -1:
        """Count an interruption; false for the one that is too many. A step that ends its own connection must end."""
        cdef int times = self.interruptions.pop(lease.id, 0) + 1
        if times >= MOST_INTERRUPTIONS:
            return False
        if len(self.interruptions) >= MOST_REMEMBERED:
            self.interruptions.clear()
        self.interruptions[lease.id] = times
        return True

    cdef void park(self, Lease lease, reason):
        """Park a task for an exception or for a text."""
        self.errors += 1
        text = self.describe(reason)
        self.parked(lease, text)
        self.move(lease, None, lease.tried + 1, text, 0.0)

    def expire(self, Lease lease):
        """The timeout of a step has passed."""
        lease.timer = None
        if lease.state != RUNNING:
            return
        lease.reason = TIMEOUT
        if lease.task is not None:
            lease.task.cancel()
        else:
            # A thread cannot be cancelled: give the task up now; its slot stays taken until the thread ends.
            self.fail(lease, CancelledError())
            self.wake()


@cython.final
cdef class Runner:
    """The coroutine of an asyncio Task that starts steps one after the other until one of them suspends.

    A step that ends without suspending costs no Task. The first one that suspends keeps the Task it was started in:
    `current_task()` is the same before and after, cancellation, timeouts and task groups work on it natively, and the
    Task ends when the step does. Another runner then takes over the rest. Each step runs in its own copy of the
    worker's context, as with `create_task`. A step that ended but left a trace on the Task (a reference, a callback, a
    name, a cancellation) retires it, so that no step after it can be reached or can see it.
    """

    cdef Dispatcher dispatcher
    cdef object task
    cdef Lease lease  # the suspended step's, else None
    cdef object coroutine
    cdef object context
    cdef object name
    cdef Py_ssize_t references
    cdef Py_ssize_t weak_references
    cdef bint over
    cdef object __weakref__

    def __cinit__(self, Dispatcher dispatcher):
        self.dispatcher = dispatcher

    @property
    def cr_frame(self):
        """The frame of the step, so that a debugger's look at the Task shows it."""
        return None if self.coroutine is None else self.coroutine.cr_frame

    def __await__(self):
        return self

    def __iter__(self):
        return self

    def __next__(self):
        return self.send(None)

    def send(self, value):
        if self.over:
            raise StopIteration
        try:
            return self.serve() if self.lease is None else self.resume(None)
        except StopIteration:
            raise
        except BaseException as error:
            self.dispatcher.broke(error)
            raise

    def throw(self, kind, value=None, traceback=None):
        error = kind if isinstance(kind, BaseException) else value if isinstance(value, BaseException) else kind()
        if self.lease is None:
            # Cancelled between two steps: only the end of the loop does that.
            self.over = True
            self.dispatcher.runners -= 1
            raise error
        return self.resume(error)

    def close(self):
        if self.coroutine is not None:
            self.coroutine.close()

    cdef object serve(self):
        """Start steps from the queue; what the first one that suspends has yielded, or None to give the loop a turn."""
        cdef Dispatcher dispatcher = self.dispatcher
        cdef Lease lease
        self.references = Py_REFCNT(<PyObject*>self.task)
        self.weak_references = getweakrefcount(self.task)
        self.name = self.task.get_name()
        cdef PyObject* waits_for = NULL
        while dispatcher.ready and dispatcher.suspended < dispatcher.limit:
            if not dispatcher.has_time():
                dispatcher.width = 1
                if dispatcher.runners == 1:
                    return None
                break
            lease = dispatcher.ready.popleft()
            if lease.state != READY or not dispatcher.start(lease):
                continue
            context = Context(lease.id, lease.tried + 1, dispatcher.db, dispatcher.resources)
            if not lease.entry.is_async:
                self.start_in_thread(lease, context)
                continue
            if self.drive(lease, context, &waits_for):
                value = <object>waits_for
                Py_DECREF(value)
                return value
            if not self.is_pristine():
                break
        self.over = True
        self.task = None
        dispatcher.runners -= 1
        dispatcher.serve()
        raise StopIteration

    cdef bint is_pristine(self) except -1:
        """Whether the steps that have ended left the Task as they found it."""
        task = self.task
        return (
            Py_REFCNT(<PyObject*>task) == self.references + 1  # and this one here
            and not task.cancelling()
            and not task._must_cancel
            and task._callbacks is None
            and task.get_name() is self.name
            and getweakrefcount(task) == self.weak_references
        )

    cdef bint drive(self, Lease lease, context, PyObject** waits_for) except -1:
        """Run a step until it ends (false) or suspends (true; `waits_for` is a new reference to what it yielded)."""
        cdef Dispatcher dispatcher = self.dispatcher
        cdef PySendResult how = PYGEN_ERROR
        cdef PyObject* value = NULL
        error = outcome = coroutine = None
        variables = PyContext_Copy(dispatcher.context)
        dispatcher.marks.begin(lease)
        PyContext_Enter(variables)
        try:
            coroutine = lease.entry.run(lease.step, context)
            how = PyIter_Send(coroutine, None, &value)
        except BaseException as raised:
            error = raised
        PyContext_Exit(variables)
        if error is None and how == PYGEN_NEXT:
            waits_for[0] = value
            self.lease, self.coroutine, self.context = lease, coroutine, variables
            lease.task = self.task
            dispatcher.suspended += 1
            dispatcher.marks.keep(lease)
            dispatcher.marks.pause()
            if lease.entry.timeout > 0:
                lease.timer = dispatcher.loop.call_later(lease.entry.timeout, dispatcher.expire, lease)
            dispatcher.runners -= 1
            dispatcher.width = min(2 * dispatcher.width, dispatcher.concurrency) if dispatcher.has_time() else 1
            dispatcher.serve()
            return True
        if error is None:
            outcome = <object>value
            Py_DECREF(outcome)
        if lease.claims > 1:
            dispatcher.tried(lease)
        dispatcher.marks.pause()
        dispatcher.width = max(1, dispatcher.width - 1)
        dispatcher.conclude(lease, outcome, error)
        return False

    cdef object resume(self, error):
        """Go on with the suspended step; returns what it yields, or ends the Task with it."""
        cdef PySendResult how = PYGEN_NEXT
        cdef PyObject* value = NULL
        raised = outcome = None
        PyContext_Enter(self.context)
        try:
            if error is None:
                how = PyIter_Send(self.coroutine, None, &value)
                outcome = <object>value
                Py_DECREF(outcome)
            else:
                outcome = self.coroutine.throw(error)
        except StopIteration as stop:
            how, outcome = PYGEN_RETURN, stop.value
        except BaseException as caught:
            how, raised = PYGEN_RETURN, caught
        PyContext_Exit(self.context)
        if how == PYGEN_NEXT:
            return outcome
        # Runner and Task hold each other: what they held for the step is let go of now, not by the collector.
        lease, self.lease, self.task, self.coroutine, self.context = self.lease, None, None, None, None
        self.over = True
        self.dispatcher.end(lease, outcome, raised)
        raise StopIteration

    cdef object start_in_thread(self, Lease lease, context):
        cdef Dispatcher dispatcher = self.dispatcher
        dispatcher.suspended += 1
        dispatcher.marks.keep(lease)
        if lease.entry.timeout > 0:
            lease.timer = dispatcher.loop.call_later(lease.entry.timeout, dispatcher.expire, lease)
        dispatcher.start_thread(lease, lease.entry.run, context)


collections.abc.Coroutine.register(Runner)


# --- enqueue ------------------------------------------------------------------------------------------------------


@cython.final
cdef class CopyRows:
    """Builds COPY's binary format for the columns id, step, queue, priority.

    Ids count up from `first` (an int of 128 bits), so that ten million of them are a range and not a list.
    """

    cdef readonly Py_ssize_t count
    cdef bytearray buffer
    cdef object first

    HEADER = b"PGCOPY\n\xff\r\n\0" + bytes(8)
    TRAILER = b"\xff\xff"

    def __init__(self, first):
        self.first = first
        self.buffer = bytearray(self.HEADER)

    def add(self, Codec codec, bytes payload, bytes queue, int priority):
        cdef bytes prefix = codec.prefix
        cdef bytearray buffer = self.buffer
        buffer += b"\0\x04\0\0\0\x10"
        buffer += (self.first + self.count).to_bytes(16, "big")
        buffer += _int32(len(prefix) + len(payload) + 2)
        buffer += prefix
        buffer += payload
        buffer += b"}}"
        buffer += _int32(len(queue))
        buffer += queue
        buffer += _priority(2, priority)
        self.count += 1
        return len(buffer)

    def take(self):
        """What has been built since the last call."""
        buffer, self.buffer = self.buffer, bytearray()
        return bytes(buffer)


cdef object _int32 = struct.Struct("!i").pack
cdef object _priority = struct.Struct("!ih").pack
