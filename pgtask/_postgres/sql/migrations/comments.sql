-- The comments of all tables and columns, which psql shows (\d+ pg_task). They are no part of a version: each run of
-- `pgtask migrate` that changes something writes them again.

COMMENT ON TABLE pg_task IS 'Live and parked tasks of pgtask. A finished task leaves the table.';
COMMENT ON COLUMN pg_task.id IS 'The task, the same through all its steps and tries.';
COMMENT ON COLUMN pg_task.step IS 'The current state, as JSON: {"Task":{"Step":{fields}}}; a step without fields is null inside.';
COMMENT ON COLUMN pg_task.wakeup_at IS 'Not before this time, by the clock of this server.';
COMMENT ON COLUMN pg_task.tried IS 'Failed tries of the current step; 0 again when the task moves on.';
COMMENT ON COLUMN pg_task.error IS 'Set: the task is parked and waits for a person. UPDATE pg_task SET error = NULL revives it at the same step.';
COMMENT ON COLUMN pg_task.created_at IS 'Time of the enqueue.';
COMMENT ON COLUMN pg_task.updated_at IS 'Time of the last change of the task, by an outcome or by hand. A claim and a renewal do not count.';
COMMENT ON COLUMN pg_task.locked_by IS 'The lease: a fresh token of each claim batch (first half: the worker, second half: the batch). Only its holder can write the row.';
COMMENT ON COLUMN pg_task.lock_expires_at IS 'End of the lease, unless it is renewed before; then another worker may claim the task.';
COMMENT ON COLUMN pg_task.queue IS 'Workers started with --queue serve only the queues they name.';
COMMENT ON COLUMN pg_task.priority IS 'Within a queue, workers claim a higher priority first, then the oldest wakeup_at.';
COMMENT ON COLUMN pg_task.key IS 'Idempotency key: name of the task or workflow, slash, key. While a task with this key is in the table, enqueueing it again returns that task. With a slash before it: see behind.';
COMMENT ON COLUMN pg_task.claims IS 'Claims of the current step that ended without an outcome, and the current one; more than one means that a worker died or lost its lease: the task then runs again in a group that has its process to itself.';
COMMENT ON COLUMN pg_task.position IS 'Number of the flush that last wrote the row under its lease: an earlier flush that arrives late changes nothing.';
COMMENT ON COLUMN pg_task.behind IS 'Set: the task waits until the one with its key (without the slash before it) is gone; then it is due at this time.';
COMMENT ON COLUMN pg_task.expires_at IS 'No worker starts the task after this time. Null once it has begun.';
COMMENT ON COLUMN pg_task.progress IS 'Progress that the running step has reported, as of the last renewal: {"done":3,"total":10,"lease":...}. It counts while lease is locked_by.';
COMMENT ON COLUMN pg_task.limit_key IS 'Name of the limit of the step, a space, the key. While wakeup_at is infinity the task waits for this limit, or runs under it.';
COMMENT ON COLUMN pg_task.limit_at IS 'Of a task with a limit_key at infinity: the time at which it is due.';
COMMENT ON COLUMN pg_task.limit_cost IS 'Units that the step will use, by the cost of its limit.';
COMMENT ON COLUMN pg_task.trace IS 'Trace context of the producer, if that was traced and sampled: traceparent, space, tracestate.';

COMMENT ON COLUMN pg_task.group_id IS 'The group of which the task is a member: pg_task_groups.id, times -1 if the task is not between first_task and last_task.';

COMMENT ON TABLE pg_task_runs IS 'Runs of workflows: the record of each, beside its task in pg_task; it stays when the run has ended.';
COMMENT ON COLUMN pg_task_runs.id IS 'The run, and its task in pg_task until it has ended.';
COMMENT ON COLUMN pg_task_runs.name IS 'The workflow, as in @workflow(name).';
COMMENT ON COLUMN pg_task_runs.version IS 'Version of the workflow that recorded the first checkpoint; the code must be able to replay that version.';
COMMENT ON COLUMN pg_task_runs.parent IS 'The run that spawned this one; cancelling the parent cancels it too.';
COMMENT ON COLUMN pg_task_runs.state IS 'Final state: SUCCESS, ERROR or CANCELLED. ERROR is provisional: the task is parked in pg_task and resumes when its error is cleared. Null: the run has not ended.';
COMMENT ON COLUMN pg_task_runs.step IS 'pg_task.step of an ended run: the workflow and its input.';
COMMENT ON COLUMN pg_task_runs.output IS 'Result of the workflow, as JSON.';
COMMENT ON COLUMN pg_task_runs.error IS 'Reason for the state ERROR, as in pg_task.error.';
COMMENT ON COLUMN pg_task_runs.created_at IS 'Time of the trigger or spawn.';
COMMENT ON COLUMN pg_task_runs.started_at IS 'Time of the first checkpoint.';
COMMENT ON COLUMN pg_task_runs.ended_at IS 'Time of the end.';
COMMENT ON COLUMN pg_task_runs.waits_on IS 'Reason for the most recent pause.';
COMMENT ON COLUMN pg_task_runs.waits_for IS 'Number of awaited children that must end before the run is woken.';
COMMENT ON COLUMN pg_task_runs.awaited IS 'Whether the parent waits for this run: its end counts down waits_for of the parent.';
COMMENT ON COLUMN pg_task_runs.paused_until IS 'pg_task.wakeup_at as the most recent pause set it; the run is paused while the two are equal and the task has no lease and no error.';
COMMENT ON COLUMN pg_task_runs.queue IS 'pg_task.queue of a cancelled run; it resumes there.';
COMMENT ON COLUMN pg_task_runs.priority IS 'pg_task.priority of a cancelled run.';
COMMENT ON COLUMN pg_task_runs.key IS 'pg_task.key of a cancelled run, with the name of its workflow; other tasks may use it until the run resumes.';

COMMENT ON TABLE pg_task_checkpoints IS 'Recorded calls of runs: a row for each call that a replay does not repeat.';
COMMENT ON COLUMN pg_task_checkpoints.run IS 'The run.';
COMMENT ON COLUMN pg_task_checkpoints.number IS 'Order of the record within the run, from 1.';
COMMENT ON COLUMN pg_task_checkpoints.place IS 'Place of the call in the workflow: 3 is the third call, 3.0.2 the second call in the first branch of a gather there.';
COMMENT ON COLUMN pg_task_checkpoints.kind IS 'step, sleep, signal, spawn, children or value.';
COMMENT ON COLUMN pg_task_checkpoints.name IS 'Name of the call in the workflow.';
COMMENT ON COLUMN pg_task_checkpoints.result IS 'Result of the call, as JSON. Null: it failed, or the run still waits for it.';
COMMENT ON COLUMN pg_task_checkpoints.error IS 'Error of a step that failed permanently, or, with due_at, of its last try; of a signal: its timeout.';
COMMENT ON COLUMN pg_task_checkpoints.due_at IS 'End of a sleep or of the wait for a signal; of a step that has failed, the time of its next try.';
COMMENT ON COLUMN pg_task_checkpoints.seconds IS 'Duration of the step, its last try only.';
COMMENT ON COLUMN pg_task_checkpoints.recorded_at IS 'Time of the last record.';
COMMENT ON COLUMN pg_task_checkpoints.tried IS 'Failed tries of a step.';

COMMENT ON TABLE pg_task_signals IS 'Signals that runs have not taken yet. A taken signal becomes a checkpoint.';
COMMENT ON COLUMN pg_task_signals.id IS 'Runs take the signals of one name in this order.';
COMMENT ON COLUMN pg_task_signals.run IS 'The receiving run.';
COMMENT ON COLUMN pg_task_signals.name IS 'The name for which the run waits.';
COMMENT ON COLUMN pg_task_signals.payload IS 'The value, as JSON.';
COMMENT ON COLUMN pg_task_signals.sent_at IS 'Time of the send.';

COMMENT ON TABLE pg_task_archive IS 'Finished tasks of apps and tasks with archive = True. Emptied by pgtask prune.';
COMMENT ON COLUMN pg_task_archive.id IS 'The task; unique only together with finished_at, since ids of your own may repeat.';
COMMENT ON COLUMN pg_task_archive.step IS 'The last step, as JSON, with its data at the end.';
COMMENT ON COLUMN pg_task_archive.queue IS 'Last queue.';
COMMENT ON COLUMN pg_task_archive.priority IS 'Last priority.';
COMMENT ON COLUMN pg_task_archive.key IS 'Idempotency key, which other tasks may use again.';
COMMENT ON COLUMN pg_task_archive.tried IS 'Failed tries of the last step before the one that succeeded.';
COMMENT ON COLUMN pg_task_archive.created_at IS 'Time of the enqueue.';
COMMENT ON COLUMN pg_task_archive.finished_at IS 'Time of the last outcome.';
COMMENT ON COLUMN pg_task_archive.outcome IS 'Last outcome: done; no other outcome archives a task.';

COMMENT ON TABLE pg_task_stops IS 'Orders to all workers of this schema to finish their running steps and leave. Written by pgtask stop.';
COMMENT ON COLUMN pg_task_stops.id IS 'A worker obeys the orders that are given after its start.';
COMMENT ON COLUMN pg_task_stops.given_at IS 'Time of the order.';
COMMENT ON COLUMN pg_task_stops.given_by IS 'The role that gave it.';

COMMENT ON TABLE pg_task_pauses IS 'What is paused: no worker or consumer starts its tasks. Written by pgtask pause and resume.';
COMMENT ON COLUMN pg_task_pauses.kind IS 'queue, task, step or key.';
COMMENT ON COLUMN pg_task_pauses.name IS 'Of the queue, of the task or workflow, of the step: Task.Step, or of the key: Task/key.';
COMMENT ON COLUMN pg_task_pauses.reason IS 'What the person who paused it wrote.';
COMMENT ON COLUMN pg_task_pauses.paused_at IS 'Since when.';
COMMENT ON COLUMN pg_task_pauses.paused_by IS 'The role that paused it, and from where.';

COMMENT ON TABLE pg_task_actions IS 'Who did what to how many tasks: the bulk commands of pgtask, pause and resume. Shown by pgtask actions.';
COMMENT ON COLUMN pg_task_actions.id IS 'Number of the action.';
COMMENT ON COLUMN pg_task_actions.began_at IS 'Time of its begin.';
COMMENT ON COLUMN pg_task_actions.ended_at IS 'Time of its end; null: it goes on, or its process died.';
COMMENT ON COLUMN pg_task_actions.done_by IS 'The user and the host of the command or client.';
COMMENT ON COLUMN pg_task_actions.action IS 'The command: retry, cancel, move, reschedule, pause, resume, run.';
COMMENT ON COLUMN pg_task_actions.filter IS 'The words of the command, as typed.';
COMMENT ON COLUMN pg_task_actions.tasks IS 'How many tasks it has changed so far.';
COMMENT ON COLUMN pg_task_actions.state IS 'running, done, stopped (by Ctrl-C) or failed.';

COMMENT ON TABLE pg_task_schedules IS 'What starts when, again and again. Declared by apps; workers start the tasks. Shown and changed by pgtask schedules.';
COMMENT ON COLUMN pg_task_schedules.name IS 'Its name, which is part of the ids of its tasks.';
COMMENT ON COLUMN pg_task_schedules.app IS 'The app that declares it: module:attribute. Its workers start the tasks.';
COMMENT ON COLUMN pg_task_schedules.cron IS 'Minute, hour, day of the month, month, day of the week; with a sixth field before them, the second.';
COMMENT ON COLUMN pg_task_schedules.zone IS 'The time zone of the expression.';
COMMENT ON COLUMN pg_task_schedules.step IS 'The first step of each task, as JSON.';
COMMENT ON COLUMN pg_task_schedules.workflow IS 'The workflow of which it starts runs; null: it starts tasks.';
COMMENT ON COLUMN pg_task_schedules.queue IS 'The queue of each task.';
COMMENT ON COLUMN pg_task_schedules.priority IS 'The priority of each task.';
COMMENT ON COLUMN pg_task_schedules.missed IS 'What to do with times that passed while no worker looked: skip, latest or all.';
COMMENT ON COLUMN pg_task_schedules.max_missed IS 'Up to how many of them count with missed = all: the last ones.';
COMMENT ON COLUMN pg_task_schedules.overlap IS 'Whether an occurrence is left out while the task of the one before waits or runs: skip or allow.';
COMMENT ON COLUMN pg_task_schedules.next_at IS 'The next occurrence.';
COMMENT ON COLUMN pg_task_schedules.look_at IS 'Workers do not look at it earlier: next_at, unless it waits for the task of the last occurrence, or has an error.';
COMMENT ON COLUMN pg_task_schedules.last_at IS 'The last occurrence that has started a task.';
COMMENT ON COLUMN pg_task_schedules.last_task IS 'That task.';
COMMENT ON COLUMN pg_task_schedules.skipped_at IS 'The last occurrence that was left out, since it was missed, or overlapped, or the schedule was paused.';
COMMENT ON COLUMN pg_task_schedules.error IS 'Why it starts no task; workers try again each minute.';
COMMENT ON COLUMN pg_task_schedules.paused_at IS 'Since when it is paused; its occurrences are left out.';
COMMENT ON COLUMN pg_task_schedules.paused_by IS 'Who paused it.';
COMMENT ON COLUMN pg_task_schedules.removed_at IS 'Since when its app does not declare it any more; it starts nothing.';
COMMENT ON COLUMN pg_task_schedules.declared_at IS 'When its app last changed it.';

COMMENT ON TABLE pg_task_groups IS 'Groups of tasks: what each is, and whether it has ended. Shown by pgtask groups, emptied by pgtask prune --groups.';
COMMENT ON COLUMN pg_task_groups.id IS 'pg_task.group_id of its members, without the sign.';
COMMENT ON COLUMN pg_task_groups.name IS 'The name that the client gave.';
COMMENT ON COLUMN pg_task_groups.state IS 'open; cancelling, while its members are being removed; ended or cancelled.';
COMMENT ON COLUMN pg_task_groups.total IS 'Members at the start. pg_task_group_counts has those that members added.';
COMMENT ON COLUMN pg_task_groups.results IS 'Whether pg_task_group_results keeps what its members return.';
COMMENT ON COLUMN pg_task_groups.on_parked IS 'wait: parked members hold the end up; go on: they do not.';
COMMENT ON COLUMN pg_task_groups.then_step IS 'The step that is enqueued once at the end, as pg_task.step.';
COMMENT ON COLUMN pg_task_groups.then_queue IS 'Its queue.';
COMMENT ON COLUMN pg_task_groups.then_priority IS 'Its priority.';
COMMENT ON COLUMN pg_task_groups.then_task IS 'The task that was enqueued at the end.';
COMMENT ON COLUMN pg_task_groups.first_task IS 'The lowest id of the members that were enqueued at the start.';
COMMENT ON COLUMN pg_task_groups.last_task IS 'The highest such id.';
COMMENT ON COLUMN pg_task_groups.started_at IS 'Time of the start.';
COMMENT ON COLUMN pg_task_groups.cancelled_at IS 'Time of the order to cancel it.';
COMMENT ON COLUMN pg_task_groups.ended_at IS 'Time of the end: none of its members waited or ran.';

COMMENT ON TABLE pg_task_group_counts IS 'What has happened to the members of each group: a row for each session that has written outcomes. The sum counts.';
COMMENT ON COLUMN pg_task_group_counts.group_id IS 'pg_task_groups.id.';
COMMENT ON COLUMN pg_task_group_counts.slot IS 'pg_backend_pid() of the session.';
COMMENT ON COLUMN pg_task_group_counts.done IS 'Members that it has finished.';
COMMENT ON COLUMN pg_task_group_counts.added IS 'Members that it has added, enqueued by other members.';
COMMENT ON COLUMN pg_task_group_counts.parked IS 'How often it has parked a member.';
COMMENT ON COLUMN pg_task_group_counts.cancelled IS 'Members that it has removed, since the group is being cancelled.';

COMMENT ON TABLE pg_task_group_results IS 'What the members of groups have returned by Done(value).';
COMMENT ON COLUMN pg_task_group_results.group_id IS 'pg_task_groups.id.';
COMMENT ON COLUMN pg_task_group_results.task_id IS 'The task, which has left pg_task.';
COMMENT ON COLUMN pg_task_group_results.value IS 'The value, as JSON.';

COMMENT ON TABLE pg_task_schema IS 'Applied versions of the schema of pgtask. Written by pgtask migrate.';
COMMENT ON COLUMN pg_task_schema.version IS 'Number of a migration; the greatest is the version of this schema.';
COMMENT ON COLUMN pg_task_schema.applied_at IS 'Time of its application.';
COMMENT ON COLUMN pg_task_schema.needs_code IS 'The oldest code that can work with it, by the schema version that this code makes; null: the code that makes this version.';

COMMENT ON FUNCTION pgtask_enqueue IS 'Enqueue a task in this transaction, checked as by a client: SELECT pgtask_enqueue(''Greeter.ReadName'', ''{"filename": "a"}'', key => ''a'').';
COMMENT ON FUNCTION pgtask_signal IS 'Send a signal to a run of a workflow in this transaction.';
COMMENT ON FUNCTION pgtask_cancel IS 'Cancel a run with its children, or remove a task that no worker holds, in this transaction; returns whether it did.';
COMMENT ON FUNCTION pgtask_oldest_due IS 'Seconds for which the oldest task of a queue, or of all, has been due that no living worker has; 0 if there is none. For autoscalers.';
COMMENT ON FUNCTION pgtask_depth IS 'Tasks by queue and state: due, limited (due, behind a limit), scheduled, leased, parked; estimated where there are many.';
COMMENT ON FUNCTION pgtask_backlog IS 'Tasks of a queue, or of all, that are due, limited or leased; estimated where there are many.';

COMMENT ON TABLE pg_task_limits IS 'Limits of steps: declared in code, changed at run time by pgtask limit.';
COMMENT ON COLUMN pg_task_limits.name IS 'The limit, as in Limit(name).';
COMMENT ON COLUMN pg_task_limits.concurrency IS 'Steps of a key that run at once. Null: any number.';
COMMENT ON COLUMN pg_task_limits.rate IS 'Starts of a key in a second. Null: any number.';
COMMENT ON COLUMN pg_task_limits.burst IS 'Starts that an idle key saves up.';
COMMENT ON COLUMN pg_task_limits.cost_rate IS 'Units that the steps of a key use in a second. Null: any number.';
COMMENT ON COLUMN pg_task_limits.cost_burst IS 'Units that an idle key saves up.';
COMMENT ON COLUMN pg_task_limits.cost_of IS 'Field of the step that says how many units it will use.';
COMMENT ON COLUMN pg_task_limits.failures IS 'Failed tries in a row after which a key pauses. Null: it does not.';
COMMENT ON COLUMN pg_task_limits.pause IS 'Seconds of that pause; then one step probes.';
COMMENT ON COLUMN pg_task_limits.is_shared IS 'Whether the keys take turns.';
COMMENT ON COLUMN pg_task_limits.weights IS 'Weights of keys in their turns: {"key": 3}. Others have 1.';
COMMENT ON COLUMN pg_task_limits.is_strict IS 'Whether the steps of a key run in the order in which they fell due, also if one waits for its retry or is parked.';
COMMENT ON COLUMN pg_task_limits.paused_until IS 'No step of the limit starts before.';
COMMENT ON COLUMN pg_task_limits.declared IS 'The rules as the code has declared them last.';
COMMENT ON COLUMN pg_task_limits.changed IS 'Rules that people have changed, which the code does not change any more: concurrency, rate, cost.';
COMMENT ON COLUMN pg_task_limits.changed_by IS 'The person who changed a rule last.';
COMMENT ON COLUMN pg_task_limits.updated_at IS 'Time of the last change.';

COMMENT ON TABLE pg_task_limit_keys IS 'Keys of limits of which more is known than their rows in pg_task say. What runs is not counted here.';
COMMENT ON COLUMN pg_task_limit_keys.limit_key IS 'Name of the limit, a space, the key.';
COMMENT ON COLUMN pg_task_limit_keys.next_at IS 'The time at which all starts so far are paid for by the rate.';
COMMENT ON COLUMN pg_task_limit_keys.cost_next_at IS 'The time at which all units so far are paid for by the rate of the cost.';
COMMENT ON COLUMN pg_task_limit_keys.paused_until IS 'No step of the key starts before, by Throttled or a breaker.';
COMMENT ON COLUMN pg_task_limit_keys.failures IS 'Failed tries in a row.';
COMMENT ON COLUMN pg_task_limit_keys.turns IS 'Of a shared limit: the tasks that the key has had, each divided by its weight.';
COMMENT ON COLUMN pg_task_limit_keys.turn_at IS 'When that was noted last, while tasks of the key wait.';
