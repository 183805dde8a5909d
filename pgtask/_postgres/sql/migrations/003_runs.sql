-- The runs of workflows. A run that has not ended is a task of pg_task with the same id; what is here is its record.
--
-- Nothing here is read or written for a task that is no run. Whoever writes checkpoints holds the lease of the task in
-- pg_task, and its row is locked while he does: that is the fence. There are no foreign keys: a run and its task are made
-- in one statement, and what is left of a run is removed together.

CREATE TABLE IF NOT EXISTS pg_task_runs (
    id         uuid        PRIMARY KEY,
    name       text        NOT NULL,
    version    integer,
    parent     uuid,
    state      text        CHECK (state IN ('SUCCESS', 'ERROR', 'CANCELLED')),
    step       text,
    output     text,
    error      text,
    created_at timestamptz NOT NULL DEFAULT now(),
    started_at timestamptz,
    ended_at   timestamptz,
    waits_on   text,
    waits_for  integer     NOT NULL DEFAULT 0,
    awaited    boolean     NOT NULL DEFAULT false
) WITH (
    fillfactor = 60,
    autovacuum_vacuum_scale_factor = 0.02,
    autovacuum_vacuum_threshold = 5000,
    autovacuum_vacuum_cost_delay = 0
);

-- Ids are made in the order of time: the latest runs of a workflow are at the end of its part.
CREATE INDEX IF NOT EXISTS pg_task_runs_name_idx ON pg_task_runs (name, id);

CREATE INDEX IF NOT EXISTS pg_task_runs_parent_idx ON pg_task_runs (parent) WHERE parent IS NOT NULL;

CREATE TABLE IF NOT EXISTS pg_task_checkpoints (
    run         uuid             NOT NULL,
    number      integer          NOT NULL,
    place       text             NOT NULL,
    kind        text             NOT NULL,
    name        text             NOT NULL,
    result      text,
    error       text,
    due_at      timestamptz,
    seconds     double precision NOT NULL DEFAULT 0,
    recorded_at timestamptz      NOT NULL DEFAULT now(),
    PRIMARY KEY (run, number)
) WITH (
    autovacuum_vacuum_scale_factor = 0.02,
    autovacuum_vacuum_threshold = 5000
);

CREATE TABLE IF NOT EXISTS pg_task_signals (
    id      bigint      GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    run     uuid        NOT NULL,
    name    text        NOT NULL,
    payload text        NOT NULL,
    sent_at timestamptz NOT NULL DEFAULT now()
);

CREATE INDEX IF NOT EXISTS pg_task_signals_run_idx ON pg_task_signals (run, name, id);

COMMENT ON TABLE pg_task_runs IS 'Runs of workflows: what is known of each beside its task in pg_task, and for good when it has ended.';
COMMENT ON COLUMN pg_task_runs.id IS 'The run, and its task in pg_task for as long as it has not ended.';
COMMENT ON COLUMN pg_task_runs.name IS 'The workflow, as in @workflow(name).';
COMMENT ON COLUMN pg_task_runs.version IS 'The version of the workflow under which its first checkpoint was recorded; its code must be able to replay that.';
COMMENT ON COLUMN pg_task_runs.parent IS 'The run that has spawned it; it is cancelled with its parent.';
COMMENT ON COLUMN pg_task_runs.state IS 'How it has ended. ERROR is provisional: its task is parked in pg_task and goes on when the error is cleared. Null: it has not ended.';
COMMENT ON COLUMN pg_task_runs.step IS 'Of an ended run, what was pg_task.step: the workflow and its input.';
COMMENT ON COLUMN pg_task_runs.output IS 'What the workflow has returned, as JSON.';
COMMENT ON COLUMN pg_task_runs.error IS 'Why it ended as ERROR, as in pg_task.error.';
COMMENT ON COLUMN pg_task_runs.created_at IS 'When it was triggered or spawned.';
COMMENT ON COLUMN pg_task_runs.started_at IS 'When its first checkpoint was recorded.';
COMMENT ON COLUMN pg_task_runs.ended_at IS 'When it ended.';
COMMENT ON COLUMN pg_task_runs.waits_on IS 'For what it paused last; it still waits for that while its task is neither leased nor due.';
COMMENT ON COLUMN pg_task_runs.waits_for IS 'How many awaited children must end before it is woken.';
COMMENT ON COLUMN pg_task_runs.awaited IS 'Its parent waits for it: its end counts down waits_for there.';

COMMENT ON TABLE pg_task_checkpoints IS 'What the runs have recorded: a row for each thing that is not done again when a run is replayed.';
COMMENT ON COLUMN pg_task_checkpoints.run IS 'The run.';
COMMENT ON COLUMN pg_task_checkpoints.number IS 'The order in which the run has recorded it, from 1.';
COMMENT ON COLUMN pg_task_checkpoints.place IS 'Where in the workflow it is asked for: 3 is the third thing, 3.0.2 the second thing in the first branch of a gather there.';
COMMENT ON COLUMN pg_task_checkpoints.kind IS 'step, sleep, signal, spawn, children or value.';
COMMENT ON COLUMN pg_task_checkpoints.name IS 'Its name in the workflow.';
COMMENT ON COLUMN pg_task_checkpoints.result IS 'What it gave, as JSON. Null: it failed, or is still waited for.';
COMMENT ON COLUMN pg_task_checkpoints.error IS 'Why a step failed for good; of a signal, that its time was over.';
COMMENT ON COLUMN pg_task_checkpoints.due_at IS 'When a sleep, or the wait for a signal, is over.';
COMMENT ON COLUMN pg_task_checkpoints.seconds IS 'How long the step took, its last try only.';
COMMENT ON COLUMN pg_task_checkpoints.recorded_at IS 'When it was recorded.';

COMMENT ON TABLE pg_task_signals IS 'Signals that were sent to runs and not yet taken. One that is taken becomes a checkpoint.';
COMMENT ON COLUMN pg_task_signals.id IS 'Signals of one name are taken in this order.';
COMMENT ON COLUMN pg_task_signals.run IS 'The run it was sent to.';
COMMENT ON COLUMN pg_task_signals.name IS 'The name for which the run waits.';
COMMENT ON COLUMN pg_task_signals.payload IS 'What was sent, as JSON.';
COMMENT ON COLUMN pg_task_signals.sent_at IS 'When it was sent.';
