"""The buffer of the flush: outcomes that are not in the database yet."""

from typing import NamedTuple


class Rescheduled(NamedTuple):
    """A task leaves this worker: for a retry, for another step later or elsewhere, or parked. Its columns after the
    lease are parameters of flush.sql, in this order, and None leaves the column of the row as it is."""

    lease: TaskLease
    step: object
    tried: object
    error: object
    delay: object  # seconds
    queue: object
    priority: object
    claims: object


cdef Py_ssize_t QUEUE_COLUMN = Rescheduled._fields.index("queue") - 1  # of the columns after the lease


@cython.final
cdef class Outcomes:
    """The buffer of the flush: outcomes as rows, a list for each kind. `parameters` transposes them to be sent.

    - `done`, leases: the task is finished.
    - `archived`, leases: it is finished, and its row is kept in the archive, by a statement of its own: archive.sql.
    - `continued`, pairs of lease and step: it goes on under its lease.
    - `rescheduled`, see `Rescheduled`.
    """

    cdef readonly list done
    cdef readonly list archived
    cdef readonly list continued
    cdef readonly list rescheduled

    def __init__(self):
        self.done, self.archived, self.continued, self.rescheduled = [], [], [], []

    def __len__(self):
        return len(self.done) + len(self.archived) + len(self.continued) + len(self.rescheduled)

    cpdef void add_done(self, TaskLease lease):
        self.done.append(lease)

    cpdef void add_archived(self, TaskLease lease):
        self.archived.append(lease)

    cpdef void add_continued(self, TaskLease lease, str step):
        self.continued.append((lease, step))

    cpdef void add_rescheduled(
        self, TaskLease lease, step, tried, error, delay, queue=None, priority=None, claims=None
    ):
        row = (lease, step, tried, error, delay, queue, priority, claims)
        self.rescheduled.append(tuple.__new__(Rescheduled, row))  # a fifth of the time of Rescheduled(*row)

    def leases(self):
        """The leases that have an outcome here, kind by kind."""
        return [
            *self.done, *self.archived, *[row[0] for row in self.continued], *[row[0] for row in self.rescheduled]
        ]

    @property
    def size(self):
        """The characters of all texts."""
        cdef Py_ssize_t size = 0
        for _, step in self.continued:
            size += len(step)
        for row in self.rescheduled:
            size += len(row.step or "") + len(row.error or "")
        return size

    @property
    def statement(self):
        """The statement that writes the buffer. Outcomes to be archived have to be alone in it."""
        return "archive" if self.archived else "flush"

    def parameters(self, position=0):
        """The parameters of that statement, in order. `position`: the number of this flush, greater than those before."""
        if self.archived:
            return ids_and_tokens(self.archived)
        cdef list rescheduled = columns_after_lease(self.rescheduled)
        return (
            *ids_and_tokens(self.done),
            *ids_and_tokens([row[0] for row in self.continued]),
            [row[1] for row in self.continued],
            position,
            *ids_and_tokens([row[0] for row in self.rescheduled]),
            *rescheduled,
            changes_lane(rescheduled),
        )

    def take_archived(self):
        """Move the outcomes to be archived into a buffer of their own, and return it."""
        cdef Outcomes taken = Outcomes()
        self.archived, taken.archived = taken.archived, self.archived
        return taken

    def halves(self):
        """The same outcomes in two buffers."""
        cdef Py_ssize_t count = len(self)
        return self.cut(0, count // 2), self.cut(count // 2, count)

    cdef Outcomes cut(self, Py_ssize_t begin, Py_ssize_t end):
        """The outcomes from number `begin` to before `end`, in the order of `leases()`."""
        cdef Outcomes part = Outcomes()
        cdef list mine, taken
        for mine, taken in zip(self.kinds(), part.kinds()):
            taken.extend(mine[max(begin, 0):max(end, 0)])
            begin, end = begin - len(mine), end - len(mine)
        return part

    def divide(self, set ids):
        """The same outcomes in two buffers: of the tasks in `ids`, and of the others."""
        cdef Outcomes among = Outcomes(), others = Outcomes()
        cdef list mine, chosen, rest
        cdef TaskLease lease
        for mine, chosen, rest in zip(self.kinds(), among.kinds(), others.kinds()):
            for row in mine:
                lease = row if isinstance(row, TaskLease) else row[0]
                (chosen if lease.id in ids else rest).append(row)
        return among, others

    cdef tuple kinds(self):
        return self.done, self.archived, self.continued, self.rescheduled


cdef tuple ids_and_tokens(list leases):
    cdef TaskLease lease
    return [lease.id for lease in leases], [lease.token for lease in leases]


cdef list columns_after_lease(list rows):
    """Transpose rows of `Rescheduled`."""
    cdef Py_ssize_t at
    return [[(<tuple>row)[at] for row in rows] for at in range(1, len(Rescheduled._fields))]


cdef bint changes_lane(list columns):
    """Return whether a rescheduled task goes to another lane: other workers may serve it, and are to be told."""
    cdef list queues = columns[QUEUE_COLUMN], priorities = columns[QUEUE_COLUMN + 1]
    return queues.count(None) + priorities.count(None) < 2 * len(queues)


@cython.final
cdef class Handled:
    """The return value of an engine's handler whose row the journal has written: there is no outcome to flush."""


@cython.final
cdef class Requeue:
    """The return value of an engine's handler whose step is to run again in `delay` seconds, with `tried` failed tries."""

    cdef readonly double delay
    cdef readonly int tried

    def __init__(self, double delay, int tried):
        self.delay = delay
        self.tried = tried
