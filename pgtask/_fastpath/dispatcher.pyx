"""The way of a lease from its claim to the start of its step."""

import contextvars
from collections import deque

from pgtask.limits import limit_cost, limit_key
from pgtask.task import Context

cdef object Task = asyncio.Task
cdef double SLICE = 0.005  # seconds in one turn of the loop after which no further step starts
cdef double INTERRUPTION_DELAY = 1.0  # seconds until the retry of a step that lost the database while it ran
cdef int MAX_REMEMBERED = 10_000  # tasks whose interruptions or releases are remembered
cdef tuple NEVER = (0, 0.0)


cdef class Dispatcher:
    """Runs steps and puts their outcomes into the buffer.

    `admit` takes leases; a `Runner` starts them in order while fewer than `concurrency` are suspended. A step for a
    thread that may not have one yet is set aside, and the others pass it. A subclass supplies the slow and the rare:
    `wake_pump`, `may_start_thread`, `start_thread`, `end_transaction`, `describe_error`, `is_interruption`,
    `encode_new_tasks`, `encode_result`, `log_finished`, `log_failed`, `log_throttled`, `log_expired`, `log_parked`,
    `unknown_delay`, `is_foreign`, `fail_worker`, `gather_step`, `close_group`, `start_batches`.
    """

    cdef readonly Table table
    cdef readonly Leases leases
    cdef readonly Outcomes outcomes
    cdef readonly Outcomes held_outcomes  # those of steps whose rows a transaction holds
    cdef list unended  # held leases whose step goes on, or that may not run while they are held
    cdef set closed_keys  # of limits: no further step of them starts in this turn
    cdef readonly object ready  # deque of leases in state READY
    cdef readonly object closed_batches  # deque of lists of leases in state READY whose batch waits for a slot
    cdef readonly object set_aside  # deque of leases in state READY that wait for a thread
    cdef list unwanted  # leases in state RELEASED: of tasks that another app has, or of paused ones
    cdef list unlimited  # leases in state RELEASED, each with the key of the limit for which its task has to wait, and its cost
    cdef public list limit_notes  # of ended steps: the key of a limit, what happened, and a number
    cdef readonly dict released  # by task that waited too long: how often, and until when it may come back
    cdef public int returns  # how often a task has to come back, to start beside steps that compute
    cdef readonly int suspended  # steps that have started and not ended
    cdef public bint draining  # tasks that could go on here are rescheduled instead
    cdef public bint quarantined  # the same, while a group of suspects is to be alone here
    cdef public object db
    cdef public object resources
    cdef public object tools
    cdef public object spans  # of steps whose leases have a trace; None if this worker does not trace
    cdef readonly long long steps  # steps started
    cdef readonly long long batched  # those of them that run in batches
    cdef readonly long long ended  # steps ended
    cdef readonly long long refused  # rows from which no step could be started
    cdef readonly double busy  # seconds for which steps have had the loop
    cdef public long long errors  # failed tries, and rows that cannot be decoded
    cdef object loop
    cdef readonly object context  # of the last `admit`: each runner runs in it, each step in a copy of it
    cdef readonly Marks marks
    cdef readonly CounterPage page  # of the counters, or None
    cdef bint times_steps  # whether to note when steps begin
    cdef int concurrency
    cdef dict interruptions  # by task: how often in a row the database became unavailable under its step
    cdef Py_ssize_t max_step_bytes
    cdef readonly bint logs_finished  # whether `log_finished` is called
    cdef int runners  # runners that take from `ready`
    cdef int wanted_runners  # one while steps do not suspend, more while they do
    cdef double slice_end  # seconds of `clock` after which this turn of the loop starts no step; 0: it has started none
    cdef double now  # of the last `has_time`

    def __init__(
        self,
        loop,
        Table table,
        Leases leases,
        *,
        int concurrency,
        Py_ssize_t max_step_bytes,
        Marks marks=None,
        CounterPage page=None,
        bint logs_finished=False,
    ):
        self.loop = loop
        self.context = contextvars.copy_context()
        self.table = table
        self.leases = leases
        self.outcomes = Outcomes()
        self.held_outcomes = Outcomes()
        self.unended = []
        self.closed_keys = set()
        self.ready = deque()
        self.set_aside = deque()
        self.closed_batches = deque()
        self.unwanted = []
        self.unlimited = []
        self.limit_notes = []
        self.released = {}
        self.returns = 1
        self.concurrency = concurrency
        self.max_step_bytes = max_step_bytes
        self.marks = Marks(bytearray(Marks.size(concurrency))) if marks is None else marks
        self.page = page
        self.leases.notes_due = page is not None
        self.times_steps = logs_finished or page is not None
        if page is not None:
            page.register(table)
        self.interruptions = {}
        self.logs_finished = logs_finished
        self.wanted_runners = 1

    # The part of a subclass.

    def wake_pump(self):
        """Tell the pump that the buffer is no longer empty, or that a slot is free."""

    def may_start_thread(self, TaskLease lease, bint at_once):
        """Return whether `start_thread` may be called for a lease now. `at_once`: only a lack of threads forbids it."""
        return True

    def start_thread(self, TaskLease lease, run, context):
        """Call `run(lease.step, context)` in a thread, then `self.end_step(lease, outcome, error)` on the loop."""
        raise NotImplementedError

    def gather_step(self, TaskLease lease):
        """Take a decoded step that runs in a batch."""
        raise NotImplementedError

    def close_group(self, StepEntry entry):
        """Close the open group of a class, which is full."""
        raise NotImplementedError

    def start_batches(self):
        """Start batches that are closed, while there are slots."""

    def end_transaction(self, TaskLease lease, outcome, error):
        """End a step that has begun a transaction, once that has ended: by `end_step` if `lease.transaction` is None
        then, by `end_written`, or by `end_interrupted`. Until then it keeps its slot and its mark."""
        raise NotImplementedError

    def describe_error(self, error):
        """Return the text for the row's `error`."""
        return str(error)

    def is_interruption(self, error):
        """Return whether a step failed only because its connection to the database was lost."""
        return False

    def encode_new_tasks(self, TaskLease lease, items):
        """Return the `NewTask`s that the outcome of a lease enqueues. Raises `OutcomeError` for one that cannot be."""
        raise NotImplementedError

    def encode_result(self, TaskLease lease, value):
        """Return the text of the result of a member of a group; of another task, any text. Raises `OutcomeError` for a value
        that is no result."""
        raise NotImplementedError

    def log_finished(self, TaskLease lease, str label, outcome, double seconds):
        """Log that the step called `label` ended with an outcome after so many seconds. See `logs_finished`."""

    def log_failed(self, TaskLease lease, error, double delay, int tried):
        """Log that the try number `tried` failed, and that the next one starts after `delay` seconds."""

    def log_throttled(self, TaskLease lease, error, double delay):
        """Log that a step has raised `Throttled`, and is put off for `delay` seconds."""

    def log_expired(self, TaskLease lease):
        """Log a task that has expired, and leaves the table."""

    def log_parked(self, TaskLease lease, str text, error=None):
        """Log that a task was parked, with the exception if there is one."""

    def fail_worker(self, error):
        """Stop the worker: the engine itself has failed."""

    def unknown_delay(self, str name):
        """Return the seconds after which to try an unknown step again, or None to park its task."""

    def is_foreign(self, TaskLease lease, str family):
        """Return whether a task that this app does not have is left to another app."""
        return False

    # Leases come and go.

    def admit(self, list leases):
        """Take leases in order, to run them as soon as there is room."""
        self.context = contextvars.copy_context()
        self.ready.extend(leases)
        self.start_runners()

    def take_outcomes(self):
        """Return the buffer, and begin a new one."""
        outcomes = self.outcomes
        self.outcomes = Outcomes()
        return outcomes

    def take_held(self):
        """End the turn of the held leases. Return their outcomes, those that have to be leased, since their step goes on
        or may not run while they are held, and those that have not started."""
        cdef TaskLease lease
        cdef list unstarted = []
        if self.ready:
            unstarted = [lease for lease in self.ready if lease.in_turn]
            self.ready = deque([lease for lease in self.ready if not lease.in_turn])
        unended = [lease for lease in dict.fromkeys(self.unended) if lease.is_open or not lease.in_turn]
        outcomes = self.held_outcomes
        self.held_outcomes, self.unended = Outcomes(), []
        if self.closed_keys:
            self.closed_keys = set()
        return outcomes, unended, unstarted

    def take_ready(self):
        """Return the leases that have not started; none is ready afterwards."""
        cdef TaskLease lease
        ready = [lease for lease in [*self.ready, *self.set_aside] if lease.state == READY]
        self.ready.clear()
        self.set_aside.clear()
        return ready

    def take_unwanted(self):
        """Return the leases of tasks that are left to other apps, and of paused ones."""
        unwanted = self.unwanted
        if unwanted:
            self.unwanted = []
        return unwanted

    def take_unlimited(self):
        """Return the leases of tasks that were claimed beside the limit of their step, each with its key and cost."""
        unlimited = self.unlimited
        if unlimited:
            self.unlimited = []
        return unlimited

    def take_limit_notes(self):
        """Return what ended steps have shown under their limits."""
        notes = self.limit_notes
        if notes:
            self.limit_notes = []
        return notes

    def sort_limited(self, list leases):
        """Return the leases whose tasks may start here as far as their limits are concerned. The others go to
        `take_unlimited`, so that they wait for their limits and not for a slot. A row that cannot be decoded may start."""
        cdef TaskLease lease
        cdef list within = []
        for lease in leases:
            if not self.was_decoded(lease) or lease.entry.limit is None or self.is_within_limit(lease):
                within.append(lease)
        return within

    def sort_held(self, list leases):
        """Sort held leases by the limits of their steps. Return those that need none; those that may run in this turn as far
        as their limits allow, each with its key and its cost; and those whose class has not proved yet that it does not
        suspend, and may do so soon."""
        cdef TaskLease lease
        cdef list free = [], limited = [], unproved = []
        for lease in leases:
            if not self.was_decoded(lease) or lease.entry.limit is None or not lease.entry.is_holdable:
                free.append(lease)
                continue
            try:
                key = limit_key(lease.entry.limit, lease.step)
                cost = 0.0 if key is None else limit_cost(lease.entry.limit, lease.step)
            except Exception:  # it fails its try under a lease
                self.unended.append(lease)
                continue
            if key is None or lease.entry.unsuspended < 0:
                free.append(lease)
            elif lease.entry.unsuspended < PROVEN:
                unproved.append(lease)
            else:
                lease.limit_failures = -1 if lease.entry.limit.breaker is None else 0  # a turn obeys no key with failures
                limited.append((lease, key, cost))
        return free, limited, unproved

    cdef bint was_decoded(self, TaskLease lease) except -1:
        """Decode the step of a lease. Return whether that was possible; else it fails when it starts."""
        try:
            lease.entry, lease.step = self.table.decode(lease.envelope)
            lease.envelope = None
            return True
        except Exception:
            return False

    def may_prove(self, list leases):
        """Return whether one of these leases has a limit under which turns may soon run its step."""
        cdef TaskLease lease
        for lease in leases:
            if lease.entry is not None and lease.entry.limit is not None and 0 <= lease.entry.unsuspended < PROVEN:
                return lease.entry.is_holdable
        return False

    cdef bint may_run_held(self, TaskLease lease) except -1:
        """Return whether a held step may start in this turn; else its lease begins anew, and without the key of a limit."""
        if lease.entry.is_holdable and lease.entry.unsuspended >= PROVEN and not (
            self.closed_keys and lease.limit_key in self.closed_keys
        ):
            return True
        lease.limit_key = None
        return False

    cdef inline void close_key(self, TaskLease lease) except *:
        """Start no further step of the key of a held lease in this turn."""
        if lease.in_turn and lease.limit_key is not None:
            self.closed_keys.add(lease.limit_key)

    def charge_limit(self, id, units):
        """Charge the key under which a task was claimed. Safe for all threads."""
        key = self.leases.limit_key_of(id)
        if key is not None:
            self.limit_notes.append((key, "charged", units))

    cdef void leave_unwanted(self, TaskLease lease) except *:
        """Have the pump release a lease whose step does not start here."""
        lease.state = RELEASED
        self.unwanted.append(lease)
        if len(self.unwanted) == 1:
            self.wake_pump()

    @property
    def waiting(self):
        """The number of leases that wait for their turn."""
        return len(self.ready) + len(self.set_aside)

    def forget_released(self, list leases, double seconds):
        """Forget leases that waited here too long and were released. A task that comes back within so many seconds has
        returned; after `returns` returns it starts at once."""
        cdef TaskLease lease
        cdef double until = clock() + seconds
        if len(self.released) >= MAX_REMEMBERED:
            self.released.clear()
        for lease in leases:
            self.released[lease.id] = self.released.get(lease.id, NEVER)[0] + 1, until
        self.ready = deque([lease for lease in self.ready if lease.state == READY])
        self.set_aside = deque([lease for lease in self.set_aside if lease.state == READY])
        self.wake_pump()

    def start_next_steps(self, list leases):
        """Run the next steps of leases whose transition is durable."""
        cdef TaskLease lease
        cdef list ready = []
        cdef double now = clock()
        for lease in leases:
            if lease.state == ENDED:
                if self.table.has_paused_queues or (lease.entry is not None and lease.entry.is_paused):
                    self.leave_unwanted(lease)
                    continue
                lease.state = READY
                lease.waiting_since = now
                ready.append(lease)
        if ready:
            self.admit(ready)

    def drop_lost(self, TaskLease lease):
        """Forget a lease whose task another worker may hold: cancel its step and drop the outcome."""
        self.leases.remove(lease)
        was = lease.state
        lease.state = LOST
        if was == RUNNING and lease.batch is not None:
            lease.batch.note_lost()
        elif was == RUNNING and lease.task is not None:
            lease.task.cancel()

    def cancel_step(self, TaskLease lease):
        """Cancel a running step whose lease is about to be released."""
        if lease.state == RUNNING:
            lease.reason = STOP
            if lease.batch is not None:
                lease.batch.stop()
            elif lease.task is not None:
                lease.task.cancel()

    def park_unstarted(self, TaskLease lease, str reason):
        """Park a task that has not started, for a reason that continues its label. `tried` stays: there was no try."""
        if lease.state != READY:
            return
        try:
            lease.entry = self.table.find_entry(lease.envelope)
            lease.row = lease.entry.row
            reason = f"{lease.label} {reason}"
        except Exception:  # a row that cannot be decoded
            reason = f"the task {reason}"
        reject_row(self, lease, reason, None)

    # The start of a step.

    cpdef void start_runners(self):
        """Start as many runners as may take from `ready`.

        A runner whose step suspends is spent, and the next one starts in the next turn of the loop. A single runner would
        start one step in a turn, and steps that all await would never fill the slots.
        """
        cdef Py_ssize_t wanted = min(self.wanted_runners, len(self.ready), self.concurrency - self.suspended)
        while self.runners < wanted:
            self.runners += 1
            runner = Runner.__new__(Runner, self)
            # A task factory may be eager, and enter at once the context that is current here.
            context = self.context if self.loop.get_task_factory() is None else self.context.copy()
            task = self.loop.create_task(runner, context=context)
            if type(task) is Task:  # else a task factory of the app has made something of its own
                (<Runner>runner).task = task
            (<Runner>runner).made = True

    cdef bint has_time(self) except -1:
        """Return whether this turn of the loop may start another step: runners share one slice of it."""
        self.now = clock()
        if self.slice_end == 0.0:
            self.slice_end = self.now + SLICE
            self.loop.call_soon(self.end_slice)
        return self.now <= self.slice_end

    def end_slice(self):
        """Begin another turn of the loop."""
        self.slice_end = 0.0

    cdef bint prepare_step(self, TaskLease lease) except -1:
        """Decode the step of a lease. False if its row cannot be run; the outcome of that is in the buffer."""
        lease.state = RUNNING
        self.steps += 1
        try:
            if lease.step is None:
                if lease.size > 0:
                    raise DecodeError(
                        f"the step is {lease.size} bytes, more than the {self.max_step_bytes} allowed (--max-step-bytes)"
                    )
                lease.entry, lease.step = self.table.decode(lease.envelope)
                lease.envelope = None
            lease.row = lease.entry.row
            if lease.size == EXPIRED and may_expire(lease):
                self.count_refused()
                expire_task(self, lease)
                return False
        except UnknownStepError as error:
            self.count_refused()
            if error.family not in self.table.families and self.is_foreign(lease, error.family):
                if lease.in_turn:  # the end of the transaction releases it
                    lease.state = RELEASED
                else:
                    self.leave_unwanted(lease)
            else:
                reject_row(self, lease, error, self.unknown_delay(error.name))
            return False
        except DecodeError as error:
            self.count_refused()
            reject_row(self, lease, error, None)
            return False
        except MemoryError as error:
            self.count_refused()
            if is_excused(self, lease):
                reschedule(self, lease, None, None, None, INTERRUPTION_DELAY, None, None, lease.claims - 1)
            else:
                reject_row(self, lease, error, None)
            return False
        return lease.entry.limit is None or lease.in_turn or self.is_within_limit(lease)

    cdef bint is_within_limit(self, TaskLease lease) except -1:
        """Return whether the task was claimed under the limit of its step. Otherwise it has to wait for that."""
        try:
            key = limit_key(lease.entry.limit, lease.step)
            if key is None or key == lease.limit_key:
                return True
            cost = limit_cost(lease.entry.limit, lease.step)
        except Exception as error:
            if lease.state == RUNNING:
                self.count_refused()
                fail_try(self, lease, error)
                return False
            return True  # it fails when it starts
        if lease.state == RUNNING:
            self.count_refused()
        lease.state = RELEASED
        self.unlimited.append((lease, key, cost))
        if len(self.unlimited) == 1:
            self.wake_pump()
        return False

    cdef inline void count_ended(self, TaskLease lease) except *:
        self.ended += 1
        if self.page is not None:
            self.page.count_run(lease)

    cdef inline void count_refused(self) noexcept:
        self.steps -= 1
        self.refused += 1

    cdef void run_in_thread(self, TaskLease lease) except *:
        """Start a step in a thread, or set it aside until it may have one. A task that was released and soon comes back
        does not wait any more: no other worker wants it."""
        times, until = self.released.get(lease.id, NEVER)
        cdef bint at_once = lease.claims > 1 or (times >= self.returns and clock() < <double>until)
        if not self.may_start_thread(lease, at_once):
            self.steps -= 1
            lease.state = READY
            self.set_aside.append(lease)
            return
        self.released.pop(lease.id, None)
        self.suspended += 1
        lease.is_executing = True
        self.marks.mark_suspended(lease)
        if self.times_steps:
            lease.began_at = clock()
        if lease.entry.timeout > 0:
            lease.timer = self.loop.call_later(lease.entry.timeout, self.time_out, lease)
        context = Context(lease.id, lease.tried + 1, self.db, self.resources, self.tools)
        self.start_thread(lease, lease.entry.run, context)

    cpdef void start_set_aside(self) except *:
        """Start the steps that wait for a thread and may have one now."""
        cdef TaskLease lease
        if not self.set_aside:
            return
        waiting = self.set_aside
        self.set_aside = deque()
        for lease in waiting:
            if lease.state != READY and lease.state != RELEASED:
                continue
            # A lease that is being released stays until its release is known, so that no other is claimed in its place.
            if lease.state == RELEASED or self.suspended >= self.concurrency:
                self.set_aside.append(lease)
                continue
            lease.state = RUNNING
            self.steps += 1
            self.run_in_thread(lease)
        if not self.set_aside:
            self.wake_pump()

    # Batches. Their steps are decoded one by one, and counted as started then.

    cdef void gather(self, TaskLease lease) except *:
        """Put a decoded step into the open group of its class, or have `gather_step` find one."""
        cdef list group = lease.entry.group
        self.batched += 1
        if group is None or lease.claims > 1 or lease.in_turn != (<TaskLease>group[0]).in_turn:
            self.gather_step(lease)
            return
        lease.state = GATHERED
        group.append(lease)
        if len(group) >= lease.entry.batch_size:
            self.close_group(lease.entry)

    def keep_gathered(self, TaskLease lease):
        """Keep a step until its batch is closed."""
        lease.state = GATHERED

    def keep_unbegun(self, list leases):
        """Return those of the steps of a closed batch that are still here."""
        cdef TaskLease lease
        return [lease for lease in leases if lease.state == READY]

    def drop_held(self, list leases):
        """Give up steps of a batch that has not begun when their turn ends: its transaction releases them."""
        cdef TaskLease lease
        for lease in leases:
            lease.state = RELEASED
        self.steps -= len(leases)
        self.batched -= len(leases)

    def keep_ready(self, list leases):
        """Keep the steps of a closed batch until there is a slot. The renewing thread may release them."""
        cdef TaskLease lease
        cdef double now = clock()
        for lease in leases:
            if lease.state == GATHERED or lease.state == RUNNING:
                lease.state = READY
                lease.waiting_since = now

    def forget_started(self, Py_ssize_t steps):
        """Count steps that left before their batch ran as not started."""
        self.steps -= steps
        self.batched -= steps

    def take_slot(self):
        """Take a slot for a batch."""
        self.suspended += 1

    def begin_batch(self, list leases, batch):
        """Begin the steps of a batch that are still here, and return their leases."""
        cdef TaskLease lease
        cdef list begun = []
        cdef double now = clock()
        for lease in leases:
            if lease.state == READY:
                lease.state = RUNNING
                lease.is_executing = True
                lease.batch = batch
                lease.began_at = now
                begun.append(lease)
        return begun

    def mark_call(self, list leases):
        """Mark the steps of a call of a batch, which begins now."""
        cdef TaskLease lease
        for lease in leases:
            self.marks.mark_suspended(lease)

    def unmark_call(self, list leases):
        """Clear the marks of a call that has returned: the next one may kill the process before these steps end here."""
        cdef TaskLease lease
        for lease in leases:
            if lease.claims <= 1:
                self.marks.mark_ended(lease)

    def keep_running(self, list leases):
        """Return those of the steps of a batch that are still here, and end the others."""
        cdef TaskLease lease
        cdef list gone = [lease for lease in leases if lease.state != RUNNING]
        if not gone:
            return leases
        self.end_batched(gone, None, CancelledError())
        return [lease for lease in leases if lease.state == RUNNING]

    def arguments_of_batch(self, list leases):
        """Return the steps of a batch, the ids of their tasks, and the numbers of their tries."""
        cdef TaskLease lease
        cdef list steps = [], ids = [], attempts = []
        for lease in leases:
            steps.append(lease.step)
            ids.append(lease.id)
            attempts.append(lease.tried + 1)
        return steps, tuple(ids), tuple(attempts)

    def note_call(self, StepEntry entry, Py_ssize_t steps, bint suspends):
        """Note a call of so many steps that has ended, or suspends."""
        if suspends:
            entry.unsuspended = SUSPENDS
        elif entry.unsuspended < PROVEN:
            entry.unsuspended = min(PROVEN, entry.unsuspended + steps)

    def end_batched(self, list leases, list outcomes, error):
        """End steps of a batch: with an outcome or an exception for each, or all with one error."""
        cdef TaskLease lease
        cdef Py_ssize_t at
        for at, lease in enumerate(leases):
            self.unmark_step(lease, lease.claims > 1)
            self.count_ended(lease)
            lease.batch = None
            if outcomes is None:
                finish_step(self, lease, None, error)
            else:
                outcome = outcomes[at]
                if isinstance(outcome, BaseException):
                    finish_step(self, lease, None, outcome)
                else:
                    finish_step(self, lease, outcome, None)

    def end_batched_in_transaction(self, list leases, list were_suspects):
        """End steps of a batch whose outcomes are in the database, or were dropped."""
        cdef TaskLease lease
        for lease, was_suspect in zip(leases, were_suspects):
            self.unmark_step(lease, was_suspect)
            self.count_ended(lease)
            lease.batch = None
        self.wake_pump()

    def was_interrupted(self, list leases):
        """Return whether one of these steps was interrupted before in this worker."""
        cdef TaskLease lease
        for lease in leases:
            if lease.id in self.interruptions:
                return True
        return False

    def interrupt_batched(self, list leases, error, double delay):
        """End steps of a batch that run again after `delay` seconds through no fault of their own."""
        cdef TaskLease lease
        for lease in leases:
            self.unmark_step(lease, lease.claims > 1)
            self.count_ended(lease)
            lease.batch = None
            if lease.state == RUNNING and lease.reason == NOT_CANCELLED:
                interrupt_try(self, lease, error, delay)
            else:
                finish_step(self, lease, None, error)

    def end_batch(self):
        """Free the slot of a batch."""
        self.suspended -= 1
        self.fill_slot()

    def count_busy(self, double seconds):
        """Count seconds of the loop that a batch has taken."""
        self.busy += seconds

    # The end of a step that suspended or ran in a thread.

    cpdef void end_step(self, TaskLease lease, outcome, error):
        """Take the outcome or the error of a step that has ended."""
        if lease.transaction is not None:
            self.stop_timer(lease)
            lease.task = None
            self.end_transaction(lease, outcome, error)
            return
        self.free_slot(lease, lease.claims > 1)
        finish_step(self, lease, outcome, error)
        self.fill_slot()

    cdef inline void stop_timer(self, TaskLease lease) except *:
        if lease.timer is not None:
            lease.timer.cancel()
            lease.timer = None

    cdef void free_slot(self, TaskLease lease, bint is_suspect) except *:
        """Take the slot and the mark from a step that has ended."""
        self.suspended -= 1
        self.count_ended(lease)
        self.unmark_step(lease, is_suspect)
        self.stop_timer(lease)
        lease.task = None

    cdef void unmark_step(self, TaskLease lease, bint is_suspect) except *:
        """Note that a step no longer executes."""
        lease.is_executing = False
        if is_suspect:
            self.marks.mark_suspended(lease)  # what a suspect leaves behind may kill the process: `Suspects` clears it
        else:
            self.marks.mark_ended(lease)

    cdef void fill_slot(self) except *:
        """Start what may have the slot that has become free."""
        self.wake_pump()
        if self.set_aside:
            self.start_set_aside()
        if self.closed_batches:
            self.start_batches()
        self.start_runners()

    # The end of a step whose outcome a transaction writes.

    def draft_outcome(self, TaskLease lease, outcome, error=None):
        """Apply an outcome, or an error, to a buffer of its own. Return the buffer; whether it is an outcome that the
        step may have, else the buffer has its failed try; and what `undo_outcome` needs."""
        before = (
            lease.entry, lease.step, lease.tried, lease.claims, lease.transitions, self.interruptions.get(lease.id, 0)
        )
        shared = self.outcomes
        self.outcomes = Outcomes()
        try:
            is_valid = finish_step(self, lease, outcome, error)
            return self.outcomes, is_valid, before
        finally:
            self.outcomes = shared

    def undo_outcome(self, TaskLease lease, tuple before):
        """Undo `draft_outcome`: the step has not ended, unless its lease was lost meanwhile."""
        if lease.state != ENDED:
            return
        lease.entry, lease.step, lease.tried, lease.claims, lease.transitions, times = before
        if times:
            self.interruptions[lease.id] = times
        lease.state = RUNNING

    def end_written(self, TaskLease lease, bint is_suspect):
        """End a step whose outcome is in the database, or was dropped. `is_suspect`: it was one when it began."""
        self.free_slot(lease, is_suspect)
        self.fill_slot()

    def end_interrupted(self, TaskLease lease, error, double delay):
        """End a step whose transaction was rolled back through no fault of its own: it runs again after `delay`
        seconds without a used try, unless that has happened too often."""
        self.free_slot(lease, lease.claims > 1)
        if lease.state == RUNNING and lease.reason == NOT_CANCELLED:
            interrupt_try(self, lease, error, delay)
        else:
            finish_step(self, lease, None, error)
        self.fill_slot()

    def time_out(self, TaskLease lease):
        """End a step whose timeout has passed."""
        lease.timer = None
        if lease.state != RUNNING:
            return
        lease.reason = TIMEOUT
        if lease.task is not None:
            lease.task.cancel()
        else:
            # A thread cannot be cancelled: give the task up now; its slot stays taken until the thread ends.
            fail_try(self, lease, CancelledError())
            self.wake_pump()
