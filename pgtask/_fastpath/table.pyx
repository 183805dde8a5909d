"""The dispatch table: the engine's view of each step class."""

from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize

from pgtask.errors import UnknownStepError

cdef struct StepRow  # of the counters, see pages.pyx


cdef int MAX_FOUND = 10_000  # steps that tasks find by their names: a table of texts must not fill the memory


@cython.final
cdef class StepEntry:
    """A row of the dispatch table: the part of a step definition that the engine needs, once per worker."""

    cdef readonly Codec codec
    cdef readonly str family  # the name of its task
    cdef readonly object policy
    cdef readonly frozenset edges
    cdef readonly str queue
    cdef readonly int priority
    cdef public object run
    cdef readonly bint is_async
    cdef int unsuspended  # runs in a row that ended without suspending, up to PROVEN; SUSPENDS after one that suspended
    cdef readonly double timeout  # seconds; 0: none
    cdef readonly bint archive
    cdef readonly object limit  # of its policy, or None
    cdef readonly object batch  # None unless it runs in batches
    cdef readonly Py_ssize_t batch_size
    cdef bint is_holdable  # its steps may run while a transaction holds their rows, once they have proved not to suspend
    cdef public bint is_paused  # none of its steps starts
    cdef StepRow* row  # NULL unless this worker counts
    cdef public list group  # leases of the open group that each step of this class may join at once, or None

    def __init__(self, definition):
        self.codec = Codec(definition.cls, definition.task, definition.name, definition.transparent)
        self.family = definition.task
        self.policy = definition.policy
        self.edges = frozenset(definition.edges)
        self.queue = definition.policy.queue
        self.priority = definition.policy.priority
        self.batch = definition.batch
        self.batch_size = 0 if definition.batch is None else definition.batch.size
        # That of a workflow is set by the worker.
        self.run = getattr(definition.cls, "run" if definition.batch is None else "run_batch", None)
        self.is_async = definition.is_async
        self.archive = definition.archive
        self.limit = definition.policy.limit
        lingers = self.batch is not None and self.batch.linger
        is_short = self.is_async and self.run is not None and not self.archive and not lingers
        self.is_holdable = is_short and (self.limit is None or self.batch is None)
        timeout = definition.policy.timeout
        self.timeout = 0 if timeout is None else timeout.total_seconds()


@cython.final
cdef class Table:
    """The dispatch table: from the names in an envelope, and from a step's class, to its `StepEntry`."""

    cdef dict by_name
    cdef dict by_class
    cdef dict finders  # by name of a task: finds its steps that no class has, with the definition that they are like
    cdef int found  # such steps
    cdef readonly frozenset families  # the names of its tasks
    cdef tuple paused  # the tasks and steps of which no step starts
    cdef bint has_paused_queues  # or keys: then no task goes on without a claim
    cdef object page  # that counts its steps, or None
    cdef bytes payload  # that `find_entry` has found

    def __init__(self, definitions):
        self.by_name = {}
        self.by_class = {}
        self.paused = (), ()
        self.finders = {}
        for definition in definitions:
            entry = StepEntry(definition)
            self.by_name[b"%b\0%b" % (definition.task.encode(), definition.name.encode())] = entry
            self.by_class[definition.cls] = entry
            if hasattr(definition.cls, "find_step"):
                self.finders.setdefault(definition.task, {})[definition.cls] = definition
        self.families = frozenset(entry.family for entry in self.by_class.values())

    def pause(self, tasks, steps, bint has_queues):
        """Note of which tasks and steps (`Task.Step`) no step may start, and whether there are queues of which none may.
        """
        self.has_paused_queues = has_queues
        self.paused = tasks, steps
        for entry in self.by_name.values():
            self.note_pauses(entry)

    cdef void note_pauses(self, StepEntry entry) except *:
        entry.is_paused = entry.family in self.paused[0] or entry.codec.label in self.paused[1]

    def entry(self, cls):
        """Return the entry of a step class. Raises `KeyError`."""
        return self.by_class[cls]

    cdef StepEntry find_entry(self, str text):
        """Return the entry that an envelope names, and leave the payload in `self.payload`."""
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
                return <StepEntry>entry
        # Rare: a name with an escape, a step of another app, or a text that only looks like an envelope.
        names = scan_slowly(text)
        self.payload = names[2]
        key = b"%b\0%b" % (names[0].encode(), names[1].encode())
        entry = self.by_name.get(key) or self.find_step(key, names[0], names[1])
        if entry is None:
            raise UnknownStepError(f"{names[0]}.{names[1]}", family=names[0])
        return <StepEntry>entry

    cdef object find_step(self, bytes key, str task, str name):
        """Return the entry of a step that its task finds by its name, or None. `find_step` of the task returns the class
        of step that it is like, and what runs it."""
        definitions = self.finders.get(task)
        if definitions is None or self.found >= MAX_FOUND:
            return None
        found = next(iter(definitions)).find_step(name)
        if found is None:
            return None
        cls, run = found
        entry = StepEntry(msgspec.structs.replace(definitions[cls], name=name))
        entry.run = run
        self.note_pauses(entry)
        if self.page is not None:
            self.page.give_row(entry)
        self.by_name[key] = entry
        self.found += 1
        return entry

    def decode(self, str text):
        """Return the entry and the step of an envelope. Raises `DecodeError` or `UnknownStepError`."""
        cdef StepEntry entry = self.find_entry(text)
        try:
            return entry, entry.codec.decode(self.payload)
        except DecodeError:
            scan_slowly(text)  # name a broken envelope as such, not as a wrong payload
            raise
