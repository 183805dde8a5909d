"""The coroutine that drives steps, many of them in one asyncio Task."""

import collections.abc
from weakref import getweakrefcount

from cpython.object cimport PyObject
from cpython.ref cimport Py_DECREF

from pgtask import _current

cdef extern from *:
    """
    #include <time.h>
    #ifndef CLOCK_MONOTONIC_COARSE
    #define CLOCK_MONOTONIC_COARSE CLOCK_MONOTONIC
    #endif
    """
    int CLOCK_MONOTONIC_COARSE

cdef extern from "Python.h":
    ctypedef enum PySendResult:
        PYGEN_RETURN
        PYGEN_ERROR
        PYGEN_NEXT
    PySendResult PyIter_Send(object, object, PyObject**) except PYGEN_ERROR
    Py_ssize_t Py_REFCNT(PyObject*)
    object PyContext_Copy(object)
    int PyContext_Enter(object) except -1
    int PyContext_Exit(object) except -1
    object PyContextVar_Set(object, object)
    unsigned long PyThread_get_thread_ident()

ctypedef enum Start:
    FAILED = -1
    ELSEWHERE  # not in this Task: it was given up, waits, or runs in a thread
    RETURNED
    SUSPENDED

cdef object current_task = asyncio.current_task
cdef object current = _current.current_lease
cdef int PROVEN = 100  # runs of a step without suspending after which its context no longer names it beforehand
cdef int SUSPENDS = -1_000_000_000
cdef object end_copy = None  # in a process that a step has forked: ends it, with the error of the step, or None
cdef TaskLease executing_lease = None
cdef list executing_call = []
cdef unsigned long executing_thread = 0

for _name in ("_must_cancel", "_callbacks"):  # is_pristine() reads them
    if not hasattr(asyncio.Task, _name):
        raise ImportError(
            f"asyncio.Task of this Python has no {_name}, which pgtask needs; use CPython 3.11 to 3.14, or a newer pgtask"
        )


cdef inline double coarse_clock() noexcept nogil:
    """Monotonic seconds to some milliseconds, at a fraction of the cost of `clock`: right in the sum of differences."""
    cdef timespec now
    clock_gettime(CLOCK_MONOTONIC_COARSE, &now)
    return <double>now.tv_sec + 1e-9 * <double>now.tv_nsec


def end_copies(end):
    """Have `end` called when a step comes back to a runner, by its end or at an `await`: this process is not a worker."""
    global end_copy
    end_copy = end


def executing():
    """Return the lease whose step has the loop of this thread and has not suspended yet; else None."""
    return executing_lease if executing_thread == PyThread_get_thread_ident() else None


def note_call(list leases):
    """Note the leases of the call of a batch that has the loop of the worker; none when it has ended, or suspends."""
    global executing_call
    executing_call = leases


def executing_held():
    """Return the leases of the step, or of the call of a batch, that has the loop of the worker, if a transaction holds
    their rows; else none. Safe for the renewing thread."""
    lease, call = executing_lease, executing_call
    if lease is not None:
        return [lease] if (<TaskLease>lease).in_turn else []
    return [lease for lease in call if (<TaskLease>lease).in_turn]


def lease_executing(Leases leases, list held, double sent):
    """Add held leases to the table that a statement sent at that time has written into their rows, unless their step or
    call has ended. Return those that have ended. Safe for the renewing thread: no line between reading what executes and
    adding to the table gives up the interpreter's lock."""
    call = executing_call
    goes_on = [
        lease for lease in held if (lease is executing_lease or lease in call) and (<TaskLease>lease).in_turn
    ]
    leases.lease(goes_on, sent)
    return [lease for lease in held if lease not in goes_on]


_current.executing = executing


@cython.final
cdef class Runner:
    """The coroutine of an asyncio Task that starts steps one after the other until one of them suspends.

    A step that ends without suspending costs no Task. The first one that suspends keeps the Task it was started in:
    `current_task()` is the same before and after; cancellation, timeouts and task groups work on it natively; the Task
    ends when the step does. Another runner takes over the rest. Each step runs in its own copy of the worker's context,
    as with `create_task`. A step that ended but left a trace on the Task (a reference, a callback, a name, a
    cancellation) retires the Task, so that the trace neither reaches a later step nor is seen by one.
    """

    cdef Dispatcher dispatcher
    cdef object task
    cdef TaskLease lease  # of the suspended step, else None
    cdef object coroutine
    cdef object context
    cdef object name
    cdef Py_ssize_t references
    cdef Py_ssize_t weak_references
    cdef bint made  # its Task exists
    cdef bint over
    cdef object __weakref__

    def __cinit__(self, Dispatcher dispatcher):
        self.dispatcher = dispatcher

    @property
    def cr_frame(self):
        """The frame of the step, for a debugger that shows the stack of the Task."""
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
        if not self.made:
            return None  # called by an eager task factory: start in the next turn, or each step starts within another
        try:
            return self.start_steps() if self.lease is None else self.resume_step(None)
        except StopIteration:
            raise
        except BaseException as error:
            self.dispatcher.fail_worker(error)
            raise

    def throw(self, kind, value=None, traceback=None):
        error = kind if isinstance(kind, BaseException) else value if isinstance(value, BaseException) else kind()
        if self.lease is None:
            # Cancelled between two steps: only the end of the loop does this.
            self.over = True
            self.dispatcher.runners -= 1
            raise error
        return self.resume_step(error)

    def close(self):
        if self.coroutine is not None:
            self.coroutine.close()

    cdef object start_steps(self):
        """Start steps from `ready`. Return what the first one that suspends yields, or None to give the loop a turn."""
        cdef Dispatcher dispatcher = self.dispatcher
        cdef PyObject* waits_for = NULL
        cdef double began = 0.0
        cdef Start start
        self.note_task()
        while dispatcher.ready and dispatcher.suspended < dispatcher.concurrency:
            if not dispatcher.has_time():
                dispatcher.wanted_runners = 1
                if dispatcher.runners == 1:
                    if began > 0.0:
                        dispatcher.busy += dispatcher.now - began
                    return None
                break
            if began == 0.0:
                began = dispatcher.now
            start = self.start_next(&waits_for)
            if start == SUSPENDED:
                dispatcher.busy += dispatcher.now - began
                value = <object>waits_for
                Py_DECREF(value)
                return value
            if start == RETURNED and not self.is_pristine():
                break
        if began > 0.0:
            dispatcher.busy += clock() - began
        self.over = True
        self.task = None
        dispatcher.runners -= 1
        dispatcher.start_runners()
        raise StopIteration

    cdef void note_task(self):
        """Note the Task, as it is before steps use it."""
        if self.task is None:
            self.task = current_task()
        self.references = Py_REFCNT(<PyObject*>self.task)
        self.weak_references = getweakrefcount(self.task)
        self.name = self.task.get_name()

    cdef Start start_next(self, PyObject** waits_for) except FAILED:
        """Start the first step of `ready`, in this Task or in a thread."""
        cdef Dispatcher dispatcher = self.dispatcher
        cdef TaskLease lease = dispatcher.ready.popleft()
        cdef bint last = not dispatcher.ready
        cdef Start start = ELSEWHERE
        if lease.state != READY or not dispatcher.prepare_step(lease):  # the interpreter's lock is kept in between
            pass
        elif lease.in_turn and not dispatcher.may_run_held(lease):
            dispatcher.steps -= 1
            lease.state = READY
            dispatcher.unended.append(lease)
        elif lease.entry.batch is not None:
            dispatcher.gather(lease)
        elif not lease.entry.is_async:
            dispatcher.run_in_thread(lease)
        else:
            start = SUSPENDED if self.start_step(lease, waits_for) else RETURNED
        if last:
            dispatcher.wake_pump()  # there is room for a claim; after the step, whose own callbacks come first
        return start

    cdef bint is_pristine(self) except -1:
        """Return whether the steps that have ended left the Task as they found it."""
        task = self.task
        return (
            Py_REFCNT(<PyObject*>task) == self.references + 1  # and the local variable
            and not task.cancelling()
            and not task._must_cancel
            and not task._callbacks
            and task.get_name() is self.name
            and getweakrefcount(task) == self.weak_references
        )

    cdef bint start_step(self, TaskLease lease, PyObject** waits_for) except -1:
        """Run a step until it ends (false) or suspends (true; `waits_for` is a new reference to what it yields).

        Its context names the lease, for its Tasks and threads, unless steps of its class have proved not to suspend:
        naming costs one hundredth of such a task. Then `executing` alone names it.
        """
        global executing_lease, executing_thread
        cdef Dispatcher dispatcher = self.dispatcher
        cdef PySendResult how = PYGEN_ERROR
        cdef PyObject* value = NULL
        outcome = None
        try:
            context = Context(lease.id, lease.tried + 1, dispatcher.db, dispatcher.resources, dispatcher.tools)
            variables = PyContext_Copy(dispatcher.context)
        except MemoryError as lacking:
            if lease.claims > 1:
                dispatcher.marks.mark_suspended(lease)
            dispatcher.ended += 1
            finish_step(dispatcher, lease, None, lacking)
            return False
        dispatcher.marks.mark_started(lease)
        if dispatcher.times_steps:
            lease.began_at = dispatcher.now  # before the step was decoded
        executing_lease, executing_thread = lease, PyThread_get_thread_ident()
        PyContext_Enter(variables)
        error = self.send_first(lease, context, &how, &value)
        PyContext_Exit(variables)
        executing_lease = None
        if end_copy is not None:
            end_copy(error)
        if error is None and how == PYGEN_NEXT:
            waits_for[0] = value
            self.keep_suspended(lease, variables)
            return True
        if error is None:
            outcome = <object>value
            Py_DECREF(outcome)
        self.end_unsuspended(lease, outcome, error)
        return False

    cdef object send_first(self, TaskLease lease, context, PySendResult* how, PyObject** value):
        """Call the step, and run it until it ends or suspends; then keep its coroutine. Return its error, or None."""
        cdef StepEntry entry = lease.entry
        try:
            if entry.unsuspended < PROVEN:
                PyContextVar_Set(current, lease)
            if lease.trace is not None:
                self.dispatcher.spans.begin(lease)
            coroutine = entry.run(lease.step, context)
            how[0] = PyIter_Send(coroutine, None, value)
            if how[0] == PYGEN_NEXT:
                if entry.unsuspended == PROVEN:
                    PyContextVar_Set(current, lease)
                entry.unsuspended = SUSPENDS
                self.coroutine = coroutine
            elif entry.unsuspended < PROVEN:
                entry.unsuspended += 1
        except BaseException as raised:
            return raised
        return None

    cdef void end_unsuspended(self, TaskLease lease, outcome, error):
        """End a step that never suspended: this Task is free for the next one."""
        cdef Dispatcher dispatcher = self.dispatcher
        if lease.claims > 1:
            dispatcher.marks.mark_suspended(lease)  # as in `end_step`
        dispatcher.marks.leave_loop()
        dispatcher.wanted_runners = max(1, dispatcher.wanted_runners - 1)
        dispatcher.count_ended(lease)
        if lease.span is not None:
            dispatcher.spans.end(lease, outcome, error)
        finish_step(dispatcher, lease, outcome, error)

    cdef void keep_suspended(self, TaskLease lease, variables):
        """Keep this Task for the step that has suspended, and have other runners start the rest."""
        cdef Dispatcher dispatcher = self.dispatcher
        self.lease, self.context = lease, variables
        lease.task = self.task
        lease.is_executing = True
        if lease.in_turn:
            dispatcher.unended.append(lease)
            dispatcher.close_key(lease)
        dispatcher.suspended += 1
        dispatcher.marks.mark_suspended(lease)
        dispatcher.marks.leave_loop()
        if lease.entry.timeout > 0:
            lease.timer = dispatcher.loop.call_later(lease.entry.timeout, dispatcher.time_out, lease)
        dispatcher.runners -= 1
        if dispatcher.has_time():
            dispatcher.wanted_runners = min(2 * dispatcher.wanted_runners, dispatcher.concurrency)
        else:
            dispatcher.wanted_runners = 1
        dispatcher.start_runners()

    cdef object resume_step(self, error):
        """Resume the suspended step, with an exception if there is one. Return what it yields, or end the Task."""
        cdef PySendResult how = PYGEN_NEXT
        cdef PyObject* value = NULL
        cdef double began = coarse_clock()
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
        if end_copy is not None:
            end_copy(raised)
        self.dispatcher.busy += coarse_clock() - began
        if how == PYGEN_NEXT:
            return outcome
        # Runner and Task hold each other: drop what they hold for the step now, not when the collector runs.
        lease, self.lease, self.task, self.coroutine, self.context = self.lease, None, None, None, None
        self.over = True
        if lease.span is not None:
            self.dispatcher.spans.end(lease, outcome, raised)
        self.dispatcher.end_step(lease, outcome, raised)
        raise StopIteration


collections.abc.Coroutine.register(Runner)
