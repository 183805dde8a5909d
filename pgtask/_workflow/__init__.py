"""The workflows of a worker: functions made durable by replaying them against the journal of their run.

Theory of operation. A run is a task of `pg_task` with a record beside it. A worker claims it like any task and calls
the function of the workflow from the top. Each time the function asks its context for something, the context looks up
the *place* of the call in the history of the run: `3` is the third call, `3.0.2` the second call in the first branch
of a gather that is the third call. A place does not depend on which branch is faster. If the history has a checkpoint
there, the context returns its result. If not, the context does the work, makes a checkpoint, and returns the result. So
the function sees the same values in each replay and goes on after the last checkpoint. It goes on before the commit of
that checkpoint. The next thing that it asks for begins after it, and the end of the run shares it.

*The fence.* Each entry of the journal is written under the lease of its run, whose row stays locked to the end of the
statement, or not at all. A worker that has lost the lease gets `RunStopped`, and nothing that it does counts.

*Suspension.* When all branches of a run wait (for a time, a signal, or children), the journal releases the lease until
the first of these waits may be over. It refuses if something has come since the branches looked: each sender changes
`wakeup_at`, which the statement compares. The function is dropped; the next claim replays it.

    trigger, spawn          claim                  return
    --------------> QUEUED ------> RUNNING ------------------------> SUCCESS
                     ^ ^  ^         |  | |  raise, out of retries
                     | |  |         |  | +-------------------------> ERROR ------> resume: QUEUED
                     | |  +---------+  |
                     | |  retry, lease |  all branches wait
                     | |  lost, drain  +---------------------> PAUSED
                     | |                                          |
                     | +------------------------------------------+
                     |   due, signal, end of a child
                     |
                     +--- resume --- CANCELLED <--- cancel, from each state but SUCCESS and ERROR

The way of a checkpoint: `context` (the call) -> `history` (its place) -> `steps` (the function) -> `uncommitted` (seen,
not yet durable) -> `entries` and `journal` (the statement, shared by all runs of the worker), which exchange `values`.
Beside it: `branches` (which work, which wait), `children`, `timeouts` and `unawaited` (errors in the code of a
workflow), `executor` (one run from its claim to its end).
"""
