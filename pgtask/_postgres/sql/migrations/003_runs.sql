-- The runs of workflows. A run that has not ended is a task of pg_task with the same id; these tables hold its record.
--
-- Ordinary tasks never touch these tables. A worker that writes checkpoints holds the lease of the task in pg_task, and
-- keeps its row locked meanwhile: that is the fence. There are no foreign keys: one statement makes a run and its task,
-- and one removes all rows of a run.

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

-- Ids are in the order of time: the latest runs of a workflow are at the end of its part.
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
