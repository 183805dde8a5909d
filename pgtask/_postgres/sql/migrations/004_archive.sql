-- Finished tasks that their app wants to keep. Only people and `pgtask prune` read it: it costs the tasks that are
-- kept, and no others.
CREATE TABLE IF NOT EXISTS pg_task_archive (
    id          uuid        NOT NULL,
    step        text        NOT NULL,
    queue       text        NOT NULL,
    priority    smallint    NOT NULL,
    key         text,
    tried       integer     NOT NULL,
    created_at  timestamptz NOT NULL,
    finished_at timestamptz NOT NULL DEFAULT now(),
    outcome     text        NOT NULL,
    PRIMARY KEY (id, finished_at)
);

-- In the order of pruning.
CREATE INDEX IF NOT EXISTS pg_task_archive_finished_idx ON pg_task_archive (finished_at);
