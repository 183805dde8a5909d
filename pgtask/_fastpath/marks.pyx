"""The tasks whose steps are executing, in memory that outlives the process."""


cdef struct Mark:
    unsigned char id[16]
    unsigned long long number  # counts the steps of this process from 1; 0: the mark is free


@cython.final
cdef class Marks:
    """The ids of the tasks whose steps are executing, in memory that outlives the process that writes it.

    `memory` is a writable buffer of zeros: `Marks.size(n)` bytes for n steps that are suspended, or are suspects that
    have ended. A parent can read an anonymous shared `mmap` that it made before the fork when its child is dead.

    The first mark belongs to the step that has the loop; one that suspends, or is given to a thread, gets a mark of its
    own. The second one takes the place of the first in a turn, since then no lease in the row proves that this process
    had it. The number is written last and cleared first, so that a process that dies in between leaves no half of an id.
    The first two marks keep an id without a number: of the step that began or ended last, the second until its turn ends.
    """

    cdef Mark* marks
    cdef object memory  # keeps it alive
    cdef list free  # marks that were in use
    cdef Py_ssize_t next, count  # marks from `next` to `count` were never in use
    cdef unsigned long long number
    cdef Mark* loop  # the mark of the step that has the loop, or had it last

    def __init__(self, memory):
        cdef unsigned char[::1] view = memory
        self.memory = view
        self.marks = self.loop = <Mark*>&view[0]
        self.free = []
        self.next, self.count = 2, view.shape[0] // <Py_ssize_t>sizeof(Mark)

    @staticmethod
    def size(Py_ssize_t suspended):
        """Return the bytes that the marks of so many steps need."""
        return (suspended + 2) * sizeof(Mark)

    @property
    def room(self):
        """The number of marks that are free."""
        return len(self.free) + self.count - self.next

    cdef inline void write(self, volatile Mark* mark, bytes id) noexcept:
        self.number += 1
        memcpy(<char*>mark.id, PyBytes_AS_STRING(id), 16)
        mark.number = self.number

    cdef inline void mark_started(self, TaskLease lease) except *:
        """Mark a step that gets the loop for the first time."""
        self.loop = &self.marks[1 if lease.in_turn else 0]
        self.write(self.loop, <bytes>lease.id.bytes)

    cdef inline void leave_loop(self) noexcept:
        """Clear the mark of the step that has the loop: it has ended, or has a mark of its own."""
        (<volatile Mark*>self.loop).number = 0

    cdef void mark_suspended(self, TaskLease lease) except *:
        """Give a step a mark of its own: it goes on beside others, or what it leaves behind may."""
        cdef bytes id = lease.id.bytes
        if not lease.mark:
            if self.free:
                lease.mark = self.free.pop()
            elif self.next < self.count:  # always, unless more are suspended than the memory was made for
                lease.mark = self.next
                self.next += 1
        if lease.mark:
            self.write(&self.marks[lease.mark], id)
        memcpy(self.marks[0].id, PyBytes_AS_STRING(id), 16)
        if lease.in_turn:
            memcpy(self.marks[1].id, PyBytes_AS_STRING(id), 16)

    cdef void mark_ended(self, TaskLease lease) except *:
        """Clear the mark of a step that has ended, and note its id as the last."""
        if lease.mark:
            memcpy(self.marks[0].id, self.marks[lease.mark].id, 16)
            self.release(lease)

    cpdef void release(self, TaskLease lease) except *:
        """Clear the mark that a step has for itself, if it has one."""
        if lease.mark:
            (<volatile Mark*>&self.marks[lease.mark]).number = 0
            self.free.append(lease.mark)
            lease.mark = 0

    def forget_held(self):
        """Forget the step that ran last while a transaction held its row: the transaction has ended."""
        (<volatile Mark*>&self.marks[1]).number = 0
        memset(self.marks[1].id, 0, 16)

    def held(self):
        """Return the ids of the tasks that may have killed the process while a transaction held their rows: none, if
        none was open in which a step has run."""
        last = bytes(self.marks[1].id[:16])
        return list(dict.fromkeys([*self.executing(), last])) if any(last) else []

    def implicated(self):
        """Return the ids of the tasks that may have killed the process: those that execute, and the one that began or
        ended last. A callback or a thread that it left behind may outlive it; once its outcome is in the database, its
        task can no longer be implicated."""
        last = [bytes(self.marks[at].id[:16]) for at in range(2)]
        return list(dict.fromkeys([*self.executing(), *[id for id in last if any(id)]]))

    def holding_loop(self):
        """Return the id of the task whose step has the loop for the first time, or None."""
        cdef Py_ssize_t at
        for at in range(2):
            if self.marks[at].number:
                return self.marks[at].id[:16]
        return None

    def executing(self):
        """Return the ids (16 bytes each) that are marked, in the order in which their steps began."""
        cdef Py_ssize_t at
        found = [
            (self.marks[at].number, self.marks[at].id[:16]) for at in range(self.count) if self.marks[at].number
        ]
        return list(dict.fromkeys(id for _, id in sorted(found)))
