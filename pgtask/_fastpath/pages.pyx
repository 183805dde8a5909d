"""The counters of the workers, in memory that outlives them: the layout, its writer and its reader.

A file of pages: the first is that of the supervisor, each other one belongs to a worker, and later to the next one that
gets it. It has a head, a row for each edge that a task has taken, and a row for each step, which its name finds again.
All cells are numbers of eight bytes, and only their owner writes them, so that a reader needs no lock. A row is written
before the number of rows that includes it.
"""

from libc.stdint cimport int64_t, uint64_t

cdef enum:
    PAGE_BYTES = 294912
    HEAD_BYTES = 4096
    EDGE_BYTES = 24576
    NAME_BYTES = 504  # of the task, NUL, and the step
    BOUNDS = 20
    LAYOUT = 2  # raise it with each change of the layout

cdef uint64_t MAGIC = 0x7367617074676B01
cdef double[BOUNDS] bounds
bounds[:] = [
    0.0001, 0.001, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 30.0, 60.0, 300.0, 3600.0
]


cdef struct Histogram:
    double sum
    uint64_t[BOUNDS + 1] buckets


cdef struct StepRow:
    char[NAME_BYTES] name
    uint64_t name_bytes
    Histogram run  # seconds from its start to its end
    Histogram wait  # seconds from when it was due to its start
    uint64_t done
    uint64_t next
    uint64_t retried
    uint64_t parked
    uint64_t expired
    uint64_t postponed
    uint64_t lost


cdef struct EdgeRow:
    uint64_t start  # the place of its row
    uint64_t end
    uint64_t count


cdef struct Head:
    uint64_t magic
    uint64_t layout
    int64_t pid  # 0: its process has ended
    int64_t number  # of the worker; of the supervisor's page, the workers that it wants
    double started  # monotonic seconds
    double heard  # the same, of the last sign of life
    uint64_t holder  # the first half of the tokens of the worker
    uint64_t rows
    uint64_t edges
    # Gauges of a worker.
    uint64_t leases
    uint64_t executing
    uint64_t waiting
    uint64_t unwritten
    uint64_t is_ready
    uint64_t is_connected
    uint64_t is_listening
    uint64_t is_renewing
    uint64_t is_stopping
    # Counters.
    uint64_t claims
    uint64_t claimed
    uint64_t flushes
    uint64_t flushed
    double busy
    Histogram lag  # seconds by which its loop was late


cdef Py_ssize_t MAX_ROWS = (PAGE_BYTES - HEAD_BYTES - EDGE_BYTES) // sizeof(StepRow)
cdef Py_ssize_t MAX_EDGES = EDGE_BYTES // sizeof(EdgeRow)


cdef inline void observe(Histogram* histogram, double seconds) noexcept nogil:
    cdef int at = 0
    if seconds < 0.0:
        seconds = 0.0
    while at < BOUNDS and seconds > bounds[at]:
        at += 1
    histogram.buckets[at] += 1
    histogram.sum += seconds


@cython.final
cdef class CounterPage:
    """One page: `memory` is a writable buffer of `CounterPage.size` bytes, zeros or what an earlier process has left."""

    cdef object memory  # keeps it alive
    cdef Head* head
    cdef EdgeRow* edges
    cdef Py_ssize_t last_edge  # the place of the edge that was counted last
    cdef StepRow* rows
    cdef dict places  # of the rows of steps that tasks have gone on to by way of the queue, by the text before their fields
    cdef readonly double epoch  # seconds that `clock` is behind the clock of the database
    size = PAGE_BYTES

    def __init__(self, memory):
        cdef unsigned char[::1] view = memory
        if view.shape[0] < PAGE_BYTES:
            raise ValueError(f"a page has {PAGE_BYTES} bytes, not {view.shape[0]}")
        self.memory = view
        self.head = <Head*>&view[0]
        self.edges = <EdgeRow*>(&view[0] + HEAD_BYTES)
        self.rows = <StepRow*>(&view[0] + HEAD_BYTES + EDGE_BYTES)
        self.places = {}

    def begin(self, Py_ssize_t pid, Py_ssize_t number, double epoch, bytes holder=b""):
        """Begin the part of a process. The counters of those before it stay. `epoch`: the time now, since the epoch;
        `holder`: the first half of its tokens."""
        cdef Head* head = self.head
        head.leases = head.executing = head.waiting = head.unwritten = 0
        head.is_ready = head.is_connected = head.is_listening = head.is_renewing = head.is_stopping = 0
        head.number = number
        head.holder = int.from_bytes(holder, "big")
        head.started = head.heard = clock()
        head.layout = LAYOUT
        head.magic = MAGIC
        head.pid = pid
        if head.rows == 0:  # the first row counts what has no step: rows that cannot be decoded
            head.rows = 1
        self.epoch = epoch - clock()

    def end(self):
        """Note that the process has ended."""
        self.head.pid = 0

    def note_clock(self, double epoch, double age):
        """Note the time of the database `age` seconds ago, in seconds since the epoch."""
        self.epoch = epoch + age - clock()

    def hear(self, *, bint is_stopping=False):
        """Note a sign of life."""
        self.head.heard = clock()
        self.head.is_stopping = is_stopping

    def note_state(
        self, Py_ssize_t leases, Py_ssize_t executing, Py_ssize_t waiting, Py_ssize_t unwritten,
        *, bint is_ready, bint is_connected, bint is_listening, bint is_renewing
    ):
        """Note what a worker holds, and how it is, with a sign of life."""
        cdef Head* head = self.head
        head.leases, head.executing, head.waiting, head.unwritten = leases, executing, waiting, unwritten
        head.is_ready, head.is_connected = is_ready, is_connected
        head.is_listening, head.is_renewing = is_listening, is_renewing
        head.heard = clock()

    def note_busy(self, double seconds):
        """Add seconds for which steps have had the loop."""
        self.head.busy += seconds

    def note_lag(self, double seconds):
        """Note by how many seconds the loop was late."""
        observe(&self.head.lag, seconds)

    def note_claim(self, Py_ssize_t tasks):
        """Count a claim, or the beginning of a turn."""
        self.head.claims += 1
        self.head.claimed += tasks

    def register(self, Table table):
        """Give each step of a table its row."""
        cdef StepEntry entry
        table.page = self
        for entry in table.by_class.values():
            self.give_row(entry)

    def give_row(self, StepEntry entry):
        """Give a step its row."""
        entry.row = self.find_row(entry.family, entry.codec.label)

    cdef StepRow* find_row(self, str task, str label) except NULL:
        """Return the row of a step: that of an earlier process, or a new one; the first one if there is no room."""
        cdef bytes name = name_of_row(task, label)
        cdef Py_ssize_t at
        cdef StepRow* row
        for at in range(1, <Py_ssize_t>self.head.rows):
            row = &self.rows[at]
            if row.name[:row.name_bytes] == name:
                return row
        at = self.head.rows
        if at >= MAX_ROWS:
            return &self.rows[0]
        row = &self.rows[at]
        memcpy(row.name, PyBytes_AS_STRING(name), len(name))
        row.name_bytes = len(name)
        self.head.rows = at + 1
        return row

    cdef inline void count_run(self, TaskLease lease) noexcept:
        """Count the end of a step."""
        cdef StepRow* row = lease.row
        cdef double began = lease.began_at
        if began == 0.0 or row == NULL:
            return
        observe(&row.run, clock() - began)
        if lease.due_at > 0.0:
            observe(&row.wait, began + self.epoch - lease.due_at)
            lease.due_at = 0.0  # the next step of this lease does not wait

    cdef inline StepRow* row_of(self, TaskLease lease) noexcept:
        return &self.rows[0] if lease.row == NULL else lease.row

    def count_lost(self, list leases):
        """Count leases that were lost, and outcomes that were dropped."""
        cdef TaskLease lease
        for lease in leases:
            self.row_of(lease).lost += 1

    def count_done(self, list leases):
        """Count tasks that are done, in the database."""
        cdef TaskLease lease
        for lease in leases:
            if lease.has_expired:
                self.row_of(lease).expired += 1
            else:
                self.row_of(lease).done += 1

    def count_ended_run(self, TaskLease lease, bint is_success):
        """Count the run of a workflow that has ended, in the database."""
        if is_success:
            self.row_of(lease).done += 1
        else:
            self.row_of(lease).parked += 1

    def count_written(self, Outcomes outcomes, done, continued, rescheduled):
        """Count outcomes that are in the database. `done`, `continued` and `rescheduled` are the tasks that the
        statement has found; None is all. The others are lost."""
        cdef TaskLease lease
        cdef list ended = outcomes.done + outcomes.archived if outcomes.archived else outcomes.done
        self.head.flushes += 1
        self.head.flushed += len(outcomes)
        if done is None:
            self.count_done(ended)
        else:
            found = set(done)
            self.count_done([lease for lease in ended if lease.id in found])
            self.count_lost([lease for lease in ended if lease.id not in found])
        if outcomes.continued:
            found = None if continued is None else set(continued)
            for lease, _ in outcomes.continued:
                if found is None or lease.id in found:
                    self.count_continued(lease)
                else:
                    self.row_of(lease).lost += 1
        if outcomes.rescheduled:
            found = None if rescheduled is None else set(rescheduled)
            for row in outcomes.rescheduled:
                if found is None or row[0].id in found:
                    self.count_rescheduled(row)
                else:
                    self.row_of(row[0]).lost += 1

    def count_held(self, Outcomes outcomes, Py_ssize_t done, Py_ssize_t rescheduled):
        """Count outcomes that the transaction which held their rows has written, so many of them: of some that a trigger
        of the user's has suppressed it is not known which."""
        self.head.flushes += 1
        self.head.flushed += len(outcomes)
        self.count_done(outcomes.done[:done] if done < len(outcomes.done) else outcomes.done)
        self.count_lost(outcomes.done[done:])
        for lease, _ in outcomes.continued:
            self.count_continued(lease)
        for row in outcomes.rescheduled[:rescheduled]:
            self.count_rescheduled(row)
        self.count_lost([row[0] for row in outcomes.rescheduled[rescheduled:]])

    cdef inline void count_continued(self, TaskLease lease) noexcept:
        """Count a task that goes on under its lease, to a step that has not begun yet."""
        cdef StepRow* into = self.row_of(lease)
        into.next += 1
        self.count_edge(into, self.rows if lease.entry.row == NULL else lease.entry.row)

    cdef void count_edge(self, StepRow* start, StepRow* end) noexcept:
        """Count a task that went on from one step to another. What has no room is in no edge, but in its step."""
        cdef uint64_t here = start - self.rows, there = end - self.rows
        cdef Py_ssize_t at = self.last_edge, count = self.head.edges
        if not (at < count and self.edges[at].start == here and self.edges[at].end == there):
            at = 0
            while at < count and not (self.edges[at].start == here and self.edges[at].end == there):
                at += 1
            if at == MAX_EDGES:
                return
            if at == count:
                self.edges[at].start, self.edges[at].end = here, there
                self.head.edges = count + 1
            self.last_edge = at
        self.edges[at].count += 1

    cdef StepRow* row_of_text(self, str step) except NULL:
        """Return the row of the step that an envelope names."""
        cdef str name = step[:step.find(":", step.find(":") + 1)]
        place = self.places.get(name)
        if place is None:
            parts = name.split('"')
            place = self.find_row(parts[1], parts[3]) - self.rows
            self.places[name] = place
        return &self.rows[<Py_ssize_t>place]

    cdef void count_rescheduled(self, row) except *:
        cdef TaskLease lease = row[0]
        cdef StepRow* into = self.row_of(lease)
        _, step, tried, error, *_ = row
        if error is not None:
            into.parked += 1
        elif step is not None:
            into.next += 1
            self.count_edge(into, self.row_of_text(step))
        elif tried is not None and tried > lease.tried:
            into.retried += 1
        else:
            into.postponed += 1


cdef bytes name_of_row(str task, str label):
    """Return a name that fits: that of the task, which may be a part of the label, and the rest of the label."""
    cdef bytes name = f"{task}\0{label.removeprefix(task + '.')}".encode("utf-8", "replace")
    return name[:NAME_BYTES].decode("utf-8", "ignore").encode()


cdef dict histogram_of(const Histogram* histogram):
    cdef int at
    return {"sum": histogram.sum, "buckets": [histogram.buckets[at] for at in range(BOUNDS + 1)]}


def bucket_bounds():
    """Return the upper bounds of all buckets but the last one, in seconds."""
    cdef int at
    return tuple([bounds[at] for at in range(BOUNDS)])


def read_page(memory):
    """Return the head of a page, its steps and its edges, as dictionaries; None for a page that no process has begun.
    `memory` is a copy of its bytes, or of those of its first rows; of the head alone, there are no rows."""
    cdef const unsigned char[::1] view = memory
    cdef const Head* head
    cdef const StepRow* row
    cdef const EdgeRow* edge
    cdef Py_ssize_t at
    if view.shape[0] < HEAD_BYTES:  # its supervisor is about to give it its size
        return None
    head = <const Head*>&view[0]
    if head.magic != MAGIC or head.layout != LAYOUT:
        return None
    fields = {
        "pid": head.pid, "number": head.number, "holder": f"{head.holder:016x}", "started": head.started, "heard": head.heard,
        "leases": head.leases, "executing": head.executing, "waiting": head.waiting, "unwritten": head.unwritten,
        "is_ready": bool(head.is_ready), "is_connected": bool(head.is_connected),
        "is_listening": bool(head.is_listening), "is_renewing": bool(head.is_renewing),
        "is_stopping": bool(head.is_stopping), "claims": head.claims, "claimed": head.claimed,
        "flushes": head.flushes, "flushed": head.flushed, "busy": head.busy, "lag": histogram_of(&head.lag),
    }
    cdef Py_ssize_t room = max(0, view.shape[0] - HEAD_BYTES - EDGE_BYTES)
    cdef Py_ssize_t count = min(<Py_ssize_t>head.rows, room // <Py_ssize_t>sizeof(StepRow))
    rows = []
    for at in range(count):
        row = <const StepRow*>(&view[HEAD_BYTES + EDGE_BYTES]) + at
        task, _, step = (<const char*>row.name)[:min(row.name_bytes, <uint64_t>NAME_BYTES)].decode("utf-8", "replace").partition("\0")
        rows.append({
            "task": task, "step": step, "run": histogram_of(&row.run), "wait": histogram_of(&row.wait),
            "done": row.done, "next": row.next, "retried": row.retried, "parked": row.parked,
            "expired": row.expired, "postponed": row.postponed, "lost": row.lost,
        })
    edges = []
    for at in range(min(<Py_ssize_t>head.edges, MAX_EDGES) if count else 0):
        edge = <const EdgeRow*>(&view[HEAD_BYTES]) + at
        if edge.start < <uint64_t>count and edge.end < <uint64_t>count:
            start, end = rows[edge.start], rows[edge.end]
            edges.append({"task": start["task"], "step": start["step"], "next": end["step"], "count": edge.count})
    return fields, rows, edges


def bytes_in_use(memory):
    """Return the bytes of a page that hold its rows, from the bytes of its head."""
    cdef const unsigned char[::1] view = memory
    if view.shape[0] < HEAD_BYTES:
        return 0
    return min(PAGE_BYTES, HEAD_BYTES + EDGE_BYTES + (<const Head*>&view[0]).rows * sizeof(StepRow))
