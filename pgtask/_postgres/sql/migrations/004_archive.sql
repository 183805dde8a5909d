-- Finished tasks that their app wants to keep. Nothing reads it but people and `pgtask prune`: it costs the tasks that
-- are kept, and no other.
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

-- In the order in which it is pruned.
CREATE INDEX IF NOT EXISTS pg_task_archive_finished_idx ON pg_task_archive (finished_at);

COMMENT ON TABLE pg_task_archive IS 'Finished tasks of apps and tasks with archive = True. Emptied by pgtask prune.';
COMMENT ON COLUMN pg_task_archive.id IS 'The task; a key of its own only together with finished_at, since ids of your own may come back.';
COMMENT ON COLUMN pg_task_archive.step IS 'The last step, as JSON, with the data it had when it finished.';
COMMENT ON COLUMN pg_task_archive.queue IS 'The queue it was in last.';
COMMENT ON COLUMN pg_task_archive.priority IS 'The priority it had last.';
COMMENT ON COLUMN pg_task_archive.key IS 'Its idempotency key, which is free again.';
COMMENT ON COLUMN pg_task_archive.tried IS 'Failed tries of the last step before the one that succeeded.';
COMMENT ON COLUMN pg_task_archive.created_at IS 'When the task was enqueued.';
COMMENT ON COLUMN pg_task_archive.finished_at IS 'When its last outcome was written.';
COMMENT ON COLUMN pg_task_archive.outcome IS 'How it ended: done, so far the only way to get here.';
