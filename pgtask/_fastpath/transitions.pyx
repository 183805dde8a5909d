"""The transitions of a task: from the return value or the error of its step to a row of the buffer."""

from pgtask._retry import seconds_before_retry, throttled_seconds
from pgtask.errors import OutcomeError, StepTimeout
from pgtask.outcome import NO_TASKS, USAGE, Done, Fail, Next

cdef object CancelledError = asyncio.CancelledError
cdef int MAX_INTERRUPTIONS = 5  # in a row and in this worker: the last one counts as a failed try
cdef str LOCK_TIMEOUT = "55P03"  # another session has locked a row for too long: never the fault of the step
cdef int MAX_TRANSITIONS = 100  # under one lease; then the task queues up again behind the others


cdef str safe_repr(thing):
    """Return a short `repr`, also of an object whose own fails."""
    try:
        return repr(thing)[:100]
    except BaseException:
        return f"a {type(thing).__name__}"


cdef bint finish_step(Dispatcher dispatcher, TaskLease lease, outcome, error) except -1:
    """Turn the return value or the error of a step into a row of the buffer, even if the user's objects raise. Return
    whether it is an outcome that the step of a task may have."""
    if lease.state != RUNNING:
        return False  # lost, or given up already
    cdef StepEntry entry = lease.entry
    try:
        if not apply_outcome(dispatcher, lease, outcome, error):
            return False
        if lease.limit_key is not None and lease.limit_failures >= 0 and type(outcome) is not Fail:
            dispatcher.limit_notes.append((lease.limit_key, "ended", 0.0))
        if dispatcher.logs_finished:
            dispatcher.log_finished(lease, entry.codec.label, outcome, clock() - lease.began_at)
        return True
    except BaseException as broken:
        if lease.state == RUNNING:
            kind = type(error if error is not None else outcome).__name__
            dispatcher.errors += 1
            text = f"a {kind} of {lease.label} raised {type(broken).__name__}"
            reschedule(dispatcher, lease, None, lease.tried + 1, text, 0.0)
        return False


cdef bint apply_outcome(Dispatcher dispatcher, TaskLease lease, outcome, error) except -1:
    """Apply an outcome or an error. Return whether it is an outcome that the step of a task may have."""
    if error is not None:
        fail_try(dispatcher, lease, error)
        return False
    if dispatcher.interruptions:
        dispatcher.interruptions.pop(lease.id, None)
    kind = type(outcome)
    if kind is Done or kind is Next:
        if outcome.enqueue is not NO_TASKS:
            return apply_with_tasks(dispatcher, lease, outcome)
        if kind is Done:
            return finish_with_value(dispatcher, lease, outcome)
        try:
            continue_with(dispatcher, lease, outcome)
        except OutcomeError as wrong:
            fail_try(dispatcher, lease, wrong)
            return False
    elif kind is Handled:
        lease.state = ENDED
        dispatcher.leases.remove(lease)
        return False
    elif kind is Ended:
        return end_as(dispatcher, lease, <Ended>outcome)
    elif kind is Requeue:
        reschedule(dispatcher, lease, None, (<Requeue>outcome).tried, None, (<Requeue>outcome).delay)
        return False
    elif kind is Fail and isinstance(outcome.reason, str):
        park_task(dispatcher, lease, str(outcome.reason))
    elif kind is Fail:
        text = f"{lease.label}: Fail() takes a reason as text, not {safe_repr(outcome.reason)}"
        fail_try(dispatcher, lease, OutcomeError(text))
        return False
    else:
        what = "returned None: a return is missing" if outcome is None else f"returned {safe_repr(outcome)}"
        fail_try(dispatcher, lease, OutcomeError(f"{lease.label} {what}; return {USAGE}"))
        return False
    return True


cdef bint apply_with_tasks(Dispatcher dispatcher, TaskLease lease, outcome) except -1:
    """Apply a `Done` or `Next` that enqueues new tasks. One that cannot be enqueued is the error of the try, as is one
    that the iterable of the user raises."""
    try:
        tasks = dispatcher.encode_new_tasks(lease, outcome.enqueue)
        if lease.in_turn:  # a turn does not enqueue: it leases the task, and the flush writes the outcome
            lease.in_turn = False
            dispatcher.unended.append(lease)
        if type(outcome) is Next:
            continue_with(dispatcher, lease, outcome)
        elif not finish_with_value(dispatcher, lease, outcome):
            return False
    except Exception as wrong:
        fail_try(dispatcher, lease, wrong)
        return False
    dispatcher.outcomes.add_new_tasks(lease, tasks)
    return True


cdef bint finish_with_value(Dispatcher dispatcher, TaskLease lease, outcome) except -1:
    """End a task, and keep its result if it is a member of a group. A wrong one is the error of the try."""
    if outcome.value is not None:
        try:
            value = dispatcher.encode_result(lease, outcome.value)
        except Exception as wrong:
            fail_try(dispatcher, lease, wrong)
            return False
        if lease.group:
            (dispatcher.held_outcomes if lease.in_turn else dispatcher.outcomes).results[lease] = value
    finish_task(dispatcher, lease)
    return True


cdef void finish_task(Dispatcher dispatcher, TaskLease lease):
    """End a task, and keep it in the archive if its app or class says so."""
    lease.state = ENDED
    if lease.in_turn:
        dispatcher.held_outcomes.add_done(lease)
        return
    if lease.entry.archive:
        dispatcher.outcomes.add_archived(lease)
    else:
        dispatcher.outcomes.add_done(lease)
    if len(dispatcher.outcomes) == 1:
        dispatcher.wake_pump()


cdef bint end_as(Dispatcher dispatcher, TaskLease lease, Ended ended) except -1:
    """End a task with another step in its row. Return whether a row can hold that."""
    cdef Py_ssize_t size = 0
    if ended.step is not None:
        PyUnicode_AsUTF8AndSize(ended.step, &size)
    if size > dispatcher.max_step_bytes:
        text = f"{lease.label} ends with {size} bytes, more than the {dispatcher.max_step_bytes} allowed"
        fail_try(dispatcher, lease, OutcomeError(text))
        return False
    if ended.reason is not None:
        park_task(dispatcher, lease, ended.reason, ended.step)
        return True
    lease.state = ENDED
    if ended.step is None:
        dispatcher.outcomes.add_done(lease)
    else:
        lease.kept = ended.step
        dispatcher.outcomes.add_archived(lease)
    if len(dispatcher.outcomes) == 1:
        dispatcher.wake_pump()
    return True


cdef object continue_with(Dispatcher dispatcher, TaskLease lease, outcome):
    """Continue a task with its next step: under its lease if that starts now and here, else by way of the queue."""
    cdef StepEntry now = lease.entry
    cdef StepEntry then = next_entry(dispatcher, now, outcome.step)
    step, text = encode_next(then, outcome.step, dispatcher.max_step_bytes)
    after = outcome.after
    delay = 0.0 if after is None else after.total_seconds()
    # An override given at enqueue stays; only a policy that differs from the last step's changes the lane.
    queue = None if then.queue == now.queue else then.queue
    priority = None if then.priority == now.priority else then.priority
    leaves = (
        dispatcher.draining
        or dispatcher.quarantined
        or lease.transitions >= MAX_TRANSITIONS
        or then.limit is not None
        or lease.limit_key is not None
    )
    if delay > 0 or queue is not None or priority is not None or leaves:
        reschedule(dispatcher, lease, text, 0, None, delay, queue, priority)
        return None
    lease.state = ENDED
    lease.transitions += 1
    lease.tried = 0
    lease.claims = 1
    lease.reason = NOT_CANCELLED
    lease.progress = None
    lease.entry = then
    lease.step = step
    if lease.in_turn:
        dispatcher.held_outcomes.add_continued(lease, text)
        return None
    dispatcher.outcomes.add_continued(lease, text)
    if len(dispatcher.outcomes) == 1:
        dispatcher.wake_pump()


cdef StepEntry next_entry(Dispatcher dispatcher, StepEntry now, step):
    """Return the entry of the next step. Raises `OutcomeError` if the annotation of this one does not allow it."""
    if type(step) in now.edges:
        return dispatcher.table.by_class[type(step)]
    if isinstance(step, type):
        name = step.__name__
        raise OutcomeError(f"{now.codec.label}: {name} is a class: write Next({name}(...))")
    raise OutcomeError(
        f"{now.codec.label} returned Next({type(step).__name__}), but its annotation allows "
        + (", ".join(sorted(edge.__name__ for edge in now.edges)) or "no next step")
    )


cdef tuple encode_next(StepEntry then, step, Py_ssize_t max_bytes):
    """Return the next step as its row will hold it, decoded and as text. Raises `OutcomeError` if no row can hold it."""
    try:
        payload = then.codec.payload(step)
        # Run the step that the row will hold, here as on any other worker.
        step = then.codec.decode(payload)
    except DecodeError as error:  # its message is complete
        raise OutcomeError(f"the next step {error}") from None
    except Exception as error:
        raise OutcomeError(f"the next step {then.codec.label} cannot be stored: {error}") from error
    payload = then.codec.prefix + payload + b"}}"
    if len(payload) > max_bytes:
        raise OutcomeError(
            f"the next step {then.codec.label} is {len(payload)} bytes, more than the {max_bytes} allowed"
        )
    return step, payload.decode()


cdef void fail_try(Dispatcher dispatcher, TaskLease lease, error):
    """Take the error of a try: retry the step by its policy, or park the task."""
    if lease.reason == STOP:
        lease.state = READY  # the worker leaves: no failure of the step, its lease is released as it was
        return
    if isinstance(error, CancelledError):
        where = error.__traceback__  # what it waited for
        if lease.reason == TIMEOUT:
            error = StepTimeout(f"{lease.label} ran longer than its timeout of {lease.entry.timeout:g} s")
        else:
            error = OutcomeError(f"{lease.label} was cancelled from within: it raised CancelledError")
        error = error.with_traceback(where)
    elif (delay := throttled_seconds(error)) is not None:
        put_off(dispatcher, lease, error, delay)
        return
    elif dispatcher.is_interruption(error):
        interrupt_try(dispatcher, lease, error, INTERRUPTION_DELAY)
        return
    count_failed_try(dispatcher, lease, error)


cdef void interrupt_try(Dispatcher dispatcher, TaskLease lease, error, double delay):
    """Run a step again after a delay that has lost the database, or a race in it: not a failed try, unless that has
    happened too often. Its process lives, so this claim counts no crash."""
    if not is_excused(dispatcher, lease) and getattr(error, "sqlstate", None) != LOCK_TIMEOUT:
        count_failed_try(dispatcher, lease, error)
        return
    reschedule(dispatcher, lease, None, lease.tried, None, delay, None, None, max(lease.claims - 1, 0))


cdef void count_failed_try(Dispatcher dispatcher, TaskLease lease, error):
    """Retry a step whose try has failed by its policy, or park the task."""
    dispatcher.interruptions.pop(lease.id, None)
    lease.reason = NOT_CANCELLED
    if lease.limit_key is not None and lease.limit_failures >= 0:
        dispatcher.limit_notes.append((lease.limit_key, "failed", 1.0))
        dispatcher.close_key(lease)
    delay = seconds_before_retry(lease.entry.policy, error, lease.tried + 1)
    if delay is not None:
        dispatcher.errors += 1
        dispatcher.log_failed(lease, error, delay, lease.tried + 1)
        reschedule(dispatcher, lease, None, lease.tried + 1, None, delay)
    else:
        park_task(dispatcher, lease, error)


cdef void put_off(Dispatcher dispatcher, TaskLease lease, error, delay):
    """Put a step off that has raised `Throttled`: no failed try, however often."""
    dispatcher.interruptions.pop(lease.id, None)
    lease.reason = NOT_CANCELLED
    dispatcher.log_throttled(lease, error, delay)
    if lease.limit_key is not None:
        dispatcher.limit_notes.append((lease.limit_key, "paused", delay))
        dispatcher.close_key(lease)
    reschedule(dispatcher, lease, None, lease.tried, None, delay)


cdef bint is_excused(Dispatcher dispatcher, TaskLease lease) except -1:
    """Count an interruption. False for the one too many, so that a step that ends its own connection comes to an end."""
    cdef int times = dispatcher.interruptions.pop(lease.id, 0) + 1
    if times >= MAX_INTERRUPTIONS:
        return False
    if len(dispatcher.interruptions) >= MAX_REMEMBERED:
        dispatcher.interruptions.clear()
    dispatcher.interruptions[lease.id] = times
    return True


cdef void park_task(Dispatcher dispatcher, TaskLease lease, reason, step=None):
    """Park a task for an exception or for a text, with the text of another step if there is one."""
    dispatcher.errors += 1
    text = dispatcher.describe_error(reason)
    dispatcher.log_parked(lease, text, reason if isinstance(reason, BaseException) else None)
    reschedule(dispatcher, lease, step, lease.tried + 1, text, 0.0)


cdef bint may_expire(TaskLease lease) except -1:
    """Return whether an expired task may be ended here: not the run of a workflow, and not in a turn if it is kept in the
    archive, which the flush writes."""
    is_run = hasattr(lease.entry.codec.cls, "workflow")
    return lease.entry.run is not None and not is_run and not (lease.in_turn and lease.entry.archive)


cdef void expire_task(Dispatcher dispatcher, TaskLease lease) except *:
    """End a task that has expired before it began, or park it, as its policy says."""
    if lease.entry.policy.on_expired == "park":
        reject_row(dispatcher, lease, f"{lease.label} has expired before it began", None)
        return
    dispatcher.log_expired(lease)
    lease.has_expired = True
    finish_task(dispatcher, lease)


cdef void reject_row(Dispatcher dispatcher, TaskLease lease, error, delay):
    """Put a row that cannot be run back for `delay` seconds, or park it. `tried` stays: there was no try."""
    if delay is not None:
        reschedule(dispatcher, lease, None, None, None, delay)
    else:
        dispatcher.errors += 1
        text = dispatcher.describe_error(error)
        dispatcher.log_parked(lease, text)
        reschedule(dispatcher, lease, None, None, text, 0.0)


cdef void reschedule(
    Dispatcher dispatcher, TaskLease lease, step, tried, error, delay, queue=None, priority=None, claims=None
):
    """Give a task out of the hands of this worker."""
    lease.state = ENDED
    if lease.in_turn:
        dispatcher.held_outcomes.add_rescheduled(lease, step, tried, error, delay, queue, priority, claims)
        return
    dispatcher.outcomes.add_rescheduled(lease, step, tried, error, delay, queue, priority, claims)
    if len(dispatcher.outcomes) == 1:
        dispatcher.wake_pump()
