-- The parts that make the table a queue: the indexes of the claim, the storage settings, the wake-up triggers. Runs on
-- a table made by 001 and on one adopted from pg_task. It keeps an index that already exists under its name, so that
-- you can build those of a big table beforehand (CREATE INDEX CONCURRENTLY).

-- A concurrent build that failed leaves an invalid index, which costs writes and serves no query.
DO $$
DECLARE
    name name;
BEGIN
    FOR name IN
        SELECT relname
        FROM pg_index
        JOIN pg_class ON pg_class.oid = indexrelid
        WHERE relnamespace = quote_ident(current_schema())::regnamespace
          AND NOT indisvalid
          AND relname IN (
              'pg_task_ready_idx', 'pg_task_lease_idx', 'pg_task_parked_idx', 'pg_task_key_idx', 'pg_task_runs_name_idx',
              'pg_task_runs_parent_idx', 'pg_task_signals_run_idx', 'pg_task_archive_finished_idx', 'pg_task_behind_idx',
              'pg_task_limited_idx', 'pg_task_limit_held_idx', 'pg_task_limit_before_idx',
              'pg_task_limit_paused_idx',
              'pg_task_schedules_look_idx',
              'pg_task_group_added_idx', 'pg_task_group_parked_idx', 'pg_task_groups_open_idx'
          )
    LOOP
        EXECUTE format('DROP INDEX %I', name);
    END LOOP;
END
$$;

-- One index entry per waiting task. Rows of one lane (queue, priority) lie together in the order they fall due, so a
-- claim reads the oldest and stops, and the next wake-up of a lane is its first future entry.
CREATE INDEX IF NOT EXISTS pg_task_ready_idx ON pg_task (queue, priority, wakeup_at) WHERE locked_by IS NULL AND error IS NULL;

-- Only tasks in flight. Expired leases are at its left end.
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

-- A notification is a hint to poll. Statement level, so that a COPY of a million rows costs one.
CREATE OR REPLACE FUNCTION pg_task_notify() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    PERFORM pg_notify('pg_task_changed', '');
    RETURN NULL;
END
$$;

-- 009 replaces it, and reads its argument.
DO $$
BEGIN
    IF NOT EXISTS (SELECT FROM pg_trigger WHERE tgrelid = 'pg_task'::regclass AND tgname = 'pg_task_inserted') THEN
        CREATE TRIGGER pg_task_inserted AFTER INSERT ON pg_task
            FOR EACH STATEMENT EXECUTE FUNCTION pg_task_notify();
    END IF;
END
$$;

-- A person has rescheduled or revived a waiting task. A worker's own writes start from a leased row and do not fire
-- this.
CREATE OR REPLACE TRIGGER pg_task_rescheduled AFTER UPDATE OF wakeup_at, error, queue, priority ON pg_task
    FOR EACH ROW
    WHEN (
        OLD.locked_by IS NULL AND NEW.locked_by IS NULL AND NEW.error IS NULL
        AND (OLD.error IS NOT NULL OR OLD.wakeup_at <> NEW.wakeup_at
             OR OLD.queue <> NEW.queue OR OLD.priority <> NEW.priority)
    )
    EXECUTE FUNCTION pg_task_notify();
