"""The tasks that this worker holds, for one step after the other."""

from posix.time cimport CLOCK_MONOTONIC, clock_gettime, timespec


cdef inline double clock() noexcept nogil:
    """Monotonic seconds; only differences of these mean anything."""
    cdef timespec now
    clock_gettime(CLOCK_MONOTONIC, &now)
    return <double>now.tv_sec + 1e-9 * <double>now.tv_nsec


cdef enum:
    READY  # claimed, waits for its turn
    GATHERED  # decoded, waits for others of its batch
    RUNNING
    ENDED  # its outcome is in the buffer
    LOST  # another worker may have it: no outcome of it is written
    RELEASED  # the renewing thread releases it, since it has waited for too long; or it is a task of another app

cdef int EXPIRED = -1

cdef enum CancelReason:
    NOT_CANCELLED
    TIMEOUT
    STOP


@cython.final
cdef class TaskLease:
    """A task that this worker holds, for one step after the other, under one token."""

    cdef readonly object id
    cdef readonly object token
    cdef readonly int tried  # failed tries of the current step
    cdef readonly int claims  # claims of the current step without an outcome, this one included
    cdef readonly StepEntry entry  # None until the step is decoded
    cdef str envelope  # None once it is decoded
    cdef readonly object step
    cdef readonly int size  # bytes of a step too large to be sent; EXPIRED: the task has expired; else 0
    cdef readonly str kept  # the step that the archive gets in place of the one in the row, or None
    cdef int transitions  # to a next step under this lease
    cdef readonly double renewed  # seconds of `lease_clock` at which the last claim or renewal was sent
    cdef readonly double due  # of a suspect: its `wakeup_at` in seconds since the epoch, which names its group
    cdef double waiting_since  # seconds of `clock` from which it waits for its turn
    cdef int state
    cdef readonly bint in_turn  # of the transaction of a turn, which has its row locked: there is no lease in the row yet
    cdef CancelReason reason  # why its step is being cancelled
    cdef object task  # the asyncio Task of a suspended step
    cdef object timer  # of the timeout of a step that suspended or is in a thread
    cdef double began_at  # seconds of `clock` at which its step began, if the end of steps is logged or counted
    cdef double due_at  # seconds since the epoch at which a task fell due that is claimed and has not run; else 0
    cdef StepRow* row  # of the step that began last, if this worker counts; else NULL
    cdef bint has_expired  # it was ended since it has expired
    cdef public object transaction  # `StepTransaction` that its step has begun and that has not ended, else None
    cdef public bint has_locked_row  # that transaction has locked its row, so no other session can end the lease
    cdef readonly bint is_executing  # its step has suspended or is in a thread, and has not ended
    cdef public object batch  # that its step runs in, or None
    cdef readonly object progress  # that its step has reported, or None
    cdef object written  # the progress that its row has, or None
    cdef readonly long long group  # of which it is a member; else 0
    cdef readonly object trace  # trace context of the producer and queue, if the worker traces and the row has one
    cdef public object span  # of its last try, or None
    cdef public object limit_key  # of the limit under which it was claimed, as its row has it; or None
    cdef public int limit_failures  # failed tries in a row that the key had then; -1 if its limit has no breaker
    cdef Py_ssize_t mark  # index in `Marks` of a step that executes beside the one that has the loop; else 0

    def __repr__(self):
        return f"<TaskLease {self.id} {self.label}>"

    @property
    def label(self):
        return "(not decoded)" if self.entry is None else self.entry.codec.label

    @property
    def is_member(self):
        """True if it is a member of a group."""
        return self.group != 0

    @property
    def is_running(self):
        return self.state == RUNNING

    @property
    def is_open(self):
        """True while it waits for its turn or runs: there is no outcome yet."""
        return self.state == READY or self.state == GATHERED or self.state == RUNNING

    @property
    def was_stopped(self):
        """True if its step has begun, and was cancelled since the worker leaves."""
        return self.reason == STOP

    @property
    def has_timed_out(self):
        """True if its step was cancelled since its timeout has passed."""
        return self.reason == TIMEOUT

    @property
    def is_ready(self):
        """True while it waits for its turn in this worker."""
        return self.state == READY

    def clear_claims(self):
        """Count the claims anew: the step has got further under this claim, so earlier claims no longer matter."""
        self.claims = 1


cdef inline void put_group(TaskLease lease, long long group) noexcept:
    """Take the group of a claimed row, whose sign says where its members are found."""
    lease.group = -group if group < 0 else group


@cython.final
cdef class Leases:
    """All leases of this worker, by task id."""

    cdef dict by_id
    cdef list suspects
    cdef public bint notes_due  # whether to keep when tasks fell due
    cdef public bint has_traces  # whether rows have two more columns before the last: trace and queue
    cdef readonly Py_ssize_t releasing  # leases that the renewing thread has taken, until the loop learns of the release

    def __init__(self):
        self.by_id = {}
        self.suspects = []

    def __len__(self):
        return len(self.by_id)

    def add_claimed(self, list rows, token, double sent):
        """Add claimed rows (id, step, tried, claims, size, due, group). Return the new leases, and those of ours they displace.

        A task that is claimed here while an older lease of it is in the table was lost in between.
        """
        cdef TaskLease lease
        cdef list leases = [], displaced = []
        cdef double now = clock()
        cdef Py_ssize_t group_at = 8 if self.has_traces else 6
        cdef bint has_groups = bool(rows) and len(rows[0]) > group_at
        for row in rows:
            lease = TaskLease.__new__(TaskLease)
            lease.id = row[0]
            lease.token = token
            lease.envelope = row[1]
            lease.tried = row[2]
            lease.claims = row[3]
            lease.size = row[4] or 0
            lease.renewed = sent
            lease.waiting_since = now
            older = self.by_id.get(lease.id)
            if older is not None:
                displaced.append(older)
            self.by_id[lease.id] = lease
            leases.append(lease)
            if self.notes_due:
                lease.due_at = row[5]
            if self.has_traces and row[6] is not None:
                lease.trace = row[6], row[7]
            if has_groups and (group := row[group_at]) is not None:
                put_group(lease, group)
            if lease.claims > 1:
                lease.due = row[5] if len(row) > 5 else 0.0
                self.suspects.append(lease)
        return leases, displaced

    def hold(self, list rows, token):
        """Return leases for the rows (id, step, tried, claims, size, due, group) that a transaction has locked, suspects left
        out, and those of ours they displace. The new ones are not in the table, since no row of theirs names a token."""
        cdef TaskLease lease
        cdef list leases = [], displaced = []
        cdef double now = clock()
        cdef Py_ssize_t group_at = 8 if self.has_traces else 6
        cdef bint has_groups = bool(rows) and len(rows[0]) > group_at
        for row in rows:
            if row[3]:
                continue
            lease = TaskLease.__new__(TaskLease)
            lease.id = row[0]
            lease.token = token
            lease.envelope = row[1]
            lease.tried = row[2]
            lease.claims = 1
            lease.size = row[4] or 0
            lease.waiting_since = now
            lease.in_turn = True
            if self.notes_due:
                lease.due_at = row[5]
            if self.has_traces and row[6] is not None:
                lease.trace = row[6], row[7]
            if has_groups and (group := row[group_at]) is not None:
                put_group(lease, group)
            leases.append(lease)
            if self.by_id and lease.id in self.by_id:
                displaced.append(self.by_id[lease.id])
        return leases, displaced

    def lease(self, list leases, double sent):
        """Add held leases that a statement sent at that time writes into their rows."""
        cdef TaskLease lease
        cdef double now = clock()
        for lease in leases:
            lease.in_turn = False
            lease.renewed = sent
            lease.waiting_since = now
            self.by_id[lease.id] = lease

    def take_suspects(self):
        """Return the leases added since the last call that had a claim without an outcome before this one."""
        suspects = self.suspects
        if suspects:
            self.suspects = []
        return suspects

    cpdef void remove(self, TaskLease lease):
        if self.by_id.get(lease.id) is lease:
            del self.by_id[lease.id]

    def remove_all(self, list leases):
        cdef TaskLease lease
        for lease in leases:
            self.remove(lease)

    def get(self, id):
        return self.by_id.get(id)

    def renewed_before(self, double time):
        """Return the leases last renewed before that time of `lease_clock`, but for those that are held. Safe for the
        renewing thread."""
        cdef TaskLease lease
        return [lease for lease in list(self.by_id.values()) if lease.renewed < time and not lease.has_locked_row]

    def mark_renewed(self, list leases, double sent):
        """Note that these leases were renewed by a statement sent at that time. Safe for the renewing thread."""
        cdef TaskLease lease
        for lease in leases:
            lease.renewed = sent

    def report_progress(self, id, int attempt, progress):
        """Note the progress of this try of a step, unless that is over. Safe for all threads."""
        cdef TaskLease lease = self.by_id.get(id)
        if lease is not None and lease.state == RUNNING and lease.tried + 1 == attempt:
            lease.progress = progress

    def limit_key_of(self, id):
        """Return the key of the limit under which a task of this worker was claimed, or None. Safe for all threads."""
        cdef TaskLease lease = self.by_id.get(id)
        return None if lease is None else lease.limit_key

    def unwritten_progress(self, list leases):
        """Return the progress of each of these leases if a row has another one; else None. Safe for the renewing
        thread."""
        cdef TaskLease lease
        for lease in leases:
            if lease.progress is not lease.written:
                return [one.progress for one in leases]
        return None

    def mark_written(self, TaskLease lease, progress):
        """Note that the row of a lease has this progress. Safe for the renewing thread."""
        lease.written = progress

    def take_overdue(self, double seconds):
        """Take the leases that have waited for their turn for longer than that, suspects excepted: the loop no longer
        starts them. Safe for the renewing thread, since no line between reading a state and changing it gives up the
        interpreter's lock."""
        cdef TaskLease lease
        cdef list taken = []
        cdef double before = clock() - seconds
        for lease in list(self.by_id.values()):
            if lease.state == READY and lease.waiting_since < before and lease.claims == 1:
                lease.state = RELEASED
                self.releasing += 1
                taken.append(lease)
        return taken

    def remove_released(self, list leases):
        """Remove leases that `take_overdue` has taken and the renewing thread has released."""
        self.releasing -= len(leases)
        self.remove_all(leases)

    def list_open(self):
        """Return the leases without an outcome yet: they wait for their turn, or run."""
        cdef TaskLease lease
        return [lease for lease in self.by_id.values() if lease.is_open]

    def list_unstarted(self):
        """Return the leases that wait for their turn, and those that are being released."""
        cdef TaskLease lease
        return [lease for lease in self.by_id.values() if lease.state in (READY, GATHERED, RELEASED)]
