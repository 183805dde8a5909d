-- What makes the table a queue: the indexes of the claim, the storage settings, the wake-up triggers, the comments.
-- Runs on a table made by 001 and on one adopted from pg_task. An index that is already there under its name is taken as
-- it is, so that those of a big table can be built beforehand (CREATE INDEX CONCURRENTLY).

-- A concurrent build that failed leaves an invalid index behind, which costs writes and serves nobody.
DO $$
DECLARE
    name name;
BEGIN
    FOR name IN
        SELECT relname
        FROM pg_index
        JOIN pg_class ON pg_class.oid = indexrelid
        WHERE indrelid = 'pg_task'::regclass
          AND NOT indisvalid
          AND relname IN ('pg_task_ready_idx', 'pg_task_lease_idx', 'pg_task_parked_idx', 'pg_task_key_idx')
    LOOP
        EXECUTE format('DROP INDEX %I', name);
    END LOOP;
END
$$;

-- One index entry per waiting task. Rows of one lane (queue, priority) lie together in the order they fall due, so a
-- claim reads the oldest and stops, and the next wake-up of a lane is its first future entry.
CREATE INDEX IF NOT EXISTS pg_task_ready_idx ON pg_task (queue, priority, wakeup_at) WHERE locked_by IS NULL AND error IS NULL;

-- Only tasks in flight. Expired leases are found at its left end.
CREATE INDEX IF NOT EXISTS pg_task_lease_idx ON pg_task (lock_expires_at) WHERE locked_by IS NOT NULL;

-- Only tasks that wait for a person.
CREATE INDEX IF NOT EXISTS pg_task_parked_idx ON pg_task (wakeup_at) WHERE error IS NOT NULL;

-- At most one task in the table has a given key.
CREATE UNIQUE INDEX IF NOT EXISTS pg_task_key_idx ON pg_task (key) WHERE key IS NOT NULL;

-- Room on each page for the next version of a row (HOT), and a vacuum that follows the traffic, not the table's size.
ALTER TABLE pg_task SET (
    fillfactor = 50,
    autovacuum_vacuum_scale_factor = 0,
    autovacuum_vacuum_threshold = 5000,
    autovacuum_vacuum_cost_delay = 0,
    autovacuum_analyze_scale_factor = 0.05,
    autovacuum_analyze_threshold = 10000
);

-- A notification is a hint: "look". Statement level, so that a COPY of a million rows costs one.
CREATE OR REPLACE FUNCTION pg_task_notify() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    PERFORM pg_notify('pg_task_changed', '');
    RETURN NULL;
END
$$;

CREATE OR REPLACE TRIGGER pg_task_inserted AFTER INSERT ON pg_task
    FOR EACH STATEMENT EXECUTE FUNCTION pg_task_notify();

-- A person rescheduled or revived a waiting task. A worker's own writes start from a leased row and do not get here.
CREATE OR REPLACE TRIGGER pg_task_rescheduled AFTER UPDATE OF wakeup_at, error, queue, priority ON pg_task
    FOR EACH ROW
    WHEN (
        OLD.locked_by IS NULL AND NEW.locked_by IS NULL AND NEW.error IS NULL
        AND (OLD.error IS NOT NULL OR OLD.wakeup_at <> NEW.wakeup_at
             OR OLD.queue <> NEW.queue OR OLD.priority <> NEW.priority)
    )
    EXECUTE FUNCTION pg_task_notify();

COMMENT ON TABLE pg_task IS 'Live and parked tasks of pgtask. A finished task leaves the table.';
COMMENT ON COLUMN pg_task.id IS 'The task, the same through all its steps and tries.';
COMMENT ON COLUMN pg_task.step IS 'The current state, as JSON: {"Task":{"Step":{fields}}}; a step without fields is null inside.';
COMMENT ON COLUMN pg_task.wakeup_at IS 'Not before this time, by the clock of this server.';
COMMENT ON COLUMN pg_task.tried IS 'Failed tries of the current step; 0 again when the task moves on.';
COMMENT ON COLUMN pg_task.error IS 'Set: the task is parked and waits for a person. UPDATE pg_task SET error = NULL revives it at the same step.';
COMMENT ON COLUMN pg_task.created_at IS 'When the task was enqueued.';
COMMENT ON COLUMN pg_task.updated_at IS 'When a worker last wrote an outcome of this task.';
COMMENT ON COLUMN pg_task.locked_by IS 'The lease: a token drawn afresh for each claim batch (first half: the worker, second half: the batch). Whoever does not hold it cannot write the row.';
COMMENT ON COLUMN pg_task.lock_expires_at IS 'End of the lease, unless it is renewed before; then another worker may take the task.';
COMMENT ON COLUMN pg_task.queue IS 'Workers started with --queue serve only the queues they name.';
COMMENT ON COLUMN pg_task.priority IS 'Within a queue a higher priority is claimed first, then the oldest wakeup_at.';
COMMENT ON COLUMN pg_task.key IS 'Idempotency key: while a task with this key is in the table, enqueueing it again returns that task.';
COMMENT ON COLUMN pg_task.claims IS 'Claims of the current step that have not ended with an outcome; more than one means that a worker died or lost its lease: the task then runs by itself.';
