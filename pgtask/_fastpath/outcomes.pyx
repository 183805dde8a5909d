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


class NewTask(NamedTuple):
    """A task that the outcome of another one enqueues. Its columns after the codec are parameters of
    shared/new_tasks.sql, in this order."""

    codec: Codec
    id: object
    step: str
    at: object  # a time, or None
    delay: object  # seconds, or None
    queue: str
    priority: int
    key: object
    trace: object = None


cdef Py_ssize_t KEY_COLUMN = NewTask._fields.index("key")
cdef Py_ssize_t QUEUE_COLUMN = Rescheduled._fields.index("queue") - 1  # of the columns after the lease


@cython.final
cdef class Outcomes:
    """The buffer of the flush: outcomes as rows, a list for each kind. `parameters` transposes them to be sent.

    - `done`, leases: the task is finished.
    - `archived`, leases: it is finished, and its row is kept in the archive, by a statement of its own: archive.sql,
      or archive_as.sql if the archive gets another step than the row of one of them has.
    - `continued`, pairs of lease and step: it goes on under its lease.
    - `rescheduled`, see `Rescheduled`.

    `new_tasks`, by lease: the tasks that its outcome enqueues. Such outcomes are written by statements of their own,
    flush_enqueue.sql and archive_enqueue.sql; if one of the tasks has a trace, by those of the traced variant.

    `results`, by lease: the results of members of groups, as JSON. If a member of a group is here, all is written by
    flush_members.sql, which counts for the groups.
    """

    cdef readonly list done
    cdef readonly list archived
    cdef readonly list continued
    cdef readonly list rescheduled
    cdef readonly dict new_tasks
    cdef readonly dict results

    def __init__(self):
        self.done, self.archived, self.continued, self.rescheduled = [], [], [], []
        self.new_tasks = {}
        self.results = {}

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

    cpdef void add_new_tasks(self, TaskLease lease, list tasks):
        """Add what an outcome that is here enqueues, a list of `NewTask`."""
        if tasks:
            self.new_tasks[lease] = tasks

    def done_ids(self):
        """Return the ids of the tasks that are done."""
        cdef TaskLease lease
        return [lease.id for lease in self.done]

    @property
    def has_members(self):
        """True if a member of a group has an outcome here."""
        cdef TaskLease lease
        for lease in self.done:
            if lease.group:
                return True
        for lease in self.archived:
            if lease.group:
                return True
        for row in self.continued:
            if (<TaskLease>row[0]).group:
                return True
        for row in self.rescheduled:
            if (<TaskLease>row[0]).group:
                return True
        return False

    def leases(self):
        """The leases that have an outcome here, kind by kind."""
        return [
            *self.done, *self.archived, *[row[0] for row in self.continued], *[row[0] for row in self.rescheduled]
        ]

    @property
    def rows(self):
        """The rows that a statement writes for the buffer."""
        return len(self) + sum([len(tasks) for tasks in self.new_tasks.values()])

    @property
    def size(self):
        """The characters of all texts."""
        cdef Py_ssize_t size = 0
        cdef TaskLease lease
        for lease in self.archived:
            size += len(lease.kept or "")
        for _, step in self.continued:
            size += len(step)
        for row in self.rescheduled:
            size += len(row.step or "") + len(row.error or "")
        for tasks in self.new_tasks.values():
            for task in tasks:
                size += len(task.step) + len(task.key or "")
        for result in self.results.values():
            size += len(result)
        return size

    @property
    def statement(self):
        """The statement that writes the buffer, one of `parts`."""
        if self.has_members:
            return "flush_members:archived" if self.archived else "flush_members"
        if self.new_tasks:
            name = "archive_enqueue" if self.archived else "flush_enqueue"
            return f"{name}:traced" if are_traced(self.new_tasks) else name
        return "flush" if not self.archived else "archive_as" if keeps_others(self.archived) else "archive"

    def parameters(self, position=0):
        """The parameters of that statement, in order. `position`: the number of this flush, greater than those before."""
        cdef bint has_members = self.has_members
        if self.archived and not self.new_tasks and not has_members:
            parameters = ids_and_tokens(self.archived)
            return (*parameters, kept_steps(self.archived)) if keeps_others(self.archived) else parameters
        cdef list rescheduled = columns_after_lease(self.rescheduled)
        return (
            *ids_and_tokens(self.archived or self.done),
            *ids_and_tokens([row[0] for row in self.continued]),
            [row[1] for row in self.continued],
            position,
            *ids_and_tokens([row[0] for row in self.rescheduled]),
            *rescheduled,
            changes_lane(rescheduled),
            *(self.member_columns() if has_members else columns_of_new_tasks(self.new_tasks) if self.new_tasks else ()),
        )

    cdef tuple member_columns(self):
        """The parameters of flush_members.sql after those of flush.sql."""
        cdef list new = columns_of_new_tasks(self.new_tasks) if self.new_tasks else [[]] * len(NewTask._fields)
        if len(new) < len(NewTask._fields):
            new.append([None] * len(new[0]))  # no trace
        kept = (kept_steps(self.archived),) if self.archived else ()
        return (*new, *self.result_columns(), *kept)

    def group_columns(self):
        """The groups of the tasks that are done, and how many of each there are."""
        cdef TaskLease lease
        cdef dict counts = {}
        cdef long long group = 0
        cdef Py_ssize_t count = 0
        for lease in self.done:  # most often all of one group
            if lease.group != group:
                if count and group:
                    counts[group] = counts.get(group, 0) + count
                group, count = lease.group, 0
            count += 1
        if count and group:
            counts[group] = counts.get(group, 0) + count
        groups = sorted(counts)
        return groups, [counts[one] for one in groups]

    def result_groups(self):
        """The groups of the tasks with results."""
        cdef TaskLease lease
        return [lease.group for lease in self.results]

    def result_columns(self):
        """The ids of the tasks with results, and the results."""
        cdef TaskLease lease
        return [lease.id for lease in self.results], list(self.results.values())

    def parts(self):
        """The same outcomes in buffers that one statement each writes: those that are archived and those that enqueue
        are apart from the others."""
        cdef Outcomes plain = self, enqueuing = Outcomes()
        if self.new_tasks:
            enqueuing, plain = self.split(self.new_tasks)
        return [part for made in (plain, enqueuing) for part in made.apart_from_archived() if len(part)]

    cpdef list apart_from_archived(self):
        """The same outcomes in two buffers, the first of those to be archived."""
        if len(self.archived) in (0, len(self)):
            return [self]
        return list(self.split(set(self.archived)))

    def absorb(self, Outcomes others):
        """Add the outcomes of another buffer."""
        cdef list mine, more
        for mine, more in zip(self.kinds(), others.kinds()):
            mine.extend(more)
        self.new_tasks.update(others.new_tasks)
        self.results.update(others.results)

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
        part.take_more(self)
        return part

    def divide(self, set ids):
        """The same outcomes in two buffers: of the tasks in `ids`, and of the others."""
        return self.split({lease for lease in self.leases() if lease.id in ids})

    cdef tuple split(self, leases):
        """The same outcomes in two buffers: of the leases in a set or dict, and of the others."""
        cdef Outcomes among = Outcomes(), others = Outcomes()
        cdef list mine, chosen, rest
        for mine, chosen, rest in zip(self.kinds(), among.kinds(), others.kinds()):
            for row in mine:
                lease = row if isinstance(row, TaskLease) else row[0]
                (chosen if lease in leases else rest).append(row)
        among.take_more(self)
        others.take_more(self)
        return among, others

    cdef void take_more(self, Outcomes whole):
        """Take the new tasks and the results of the outcomes that are here, a part of `whole`."""
        if whole.new_tasks:
            self.new_tasks = {lease: whole.new_tasks[lease] for lease in self.leases() if lease in whole.new_tasks}
        if whole.results:
            self.results = {lease: whole.results[lease] for lease in self.leases() if lease in whole.results}

    cdef tuple kinds(self):
        return self.done, self.archived, self.continued, self.rescheduled


cdef tuple ids_and_tokens(list leases):
    cdef TaskLease lease
    return [lease.id for lease in leases], [lease.token for lease in leases]


cdef bint keeps_others(list archived):
    """Return whether the archive gets another step of one of these leases than its row has."""
    cdef TaskLease lease
    for lease in archived:
        if lease.kept is not None:
            return True
    return False


cdef list kept_steps(list archived):
    cdef TaskLease lease
    return [lease.kept for lease in archived]


cdef list columns_of_new_tasks(dict new_tasks):
    """Transpose new tasks, each behind the id of the task that enqueues it. Those with keys come in the order of the
    keys, as in all statements that insert them: two that share keys wait for each other."""
    cdef TaskLease lease
    cdef list rows = [(lease.id, *task[1:]) for lease, tasks in new_tasks.items() for task in tasks]
    rows.sort(key=lambda row: row[KEY_COLUMN] or "")
    columns = [list(column) for column in zip(*rows)]
    return columns if are_traced(new_tasks) else columns[:len(columns) - 1]


cdef bint are_traced(dict new_tasks):
    """Return whether one of these tasks has a trace: those of one outcome have the same."""
    cdef list tasks
    for tasks in new_tasks.values():
        if tasks and tasks[0].trace is not None:
            return True
    return False


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


@cython.final
cdef class Ended:
    """The return value of an engine's step that ends its task: in the archive as `step`, the text of one; without a
    trace if that is None; or parked as `step` if there is a `reason`."""

    cdef readonly str step
    cdef readonly str reason

    def __init__(self, str step, str reason=None):
        self.step = step
        self.reason = reason
