-- A write of `error` parks and revives a run: by a journal, a flush, the reaper or a person. A trigger passes it on to
-- the record of the run, the parent that waits for it and the clients that wait for its result. The server checks its
-- condition for rows that leave a worker for another try or another queue, never for those that are claimed, kept or
-- finished.

DO $$
BEGIN
    IF 4 > (
        SELECT count(*) FROM pg_attribute
        WHERE attrelid = 'pg_task_runs'::regclass
          AND attname IN ('queue', 'priority', 'key', 'paused_until')
          AND NOT attisdropped
    ) THEN
        ALTER TABLE pg_task_runs
            ADD COLUMN IF NOT EXISTS queue        text,
            ADD COLUMN IF NOT EXISTS priority     smallint,
            ADD COLUMN IF NOT EXISTS key          text,
            ADD COLUMN IF NOT EXISTS paused_until timestamptz;
    END IF;
END
$$;

-- Runs that are already paused have a reason for it.
UPDATE pg_task_runs AS run
SET paused_until = task.wakeup_at
FROM pg_task AS task
WHERE task.id = run.id
  AND task.locked_by IS NULL
  AND task.wakeup_at > now()
  AND run.waits_on IS NOT NULL
  AND run.paused_until IS NULL;

-- Return the workflow of a run from its step; null for a task that is no run. A run that was inserted by plain SQL has
-- no record before its first claim, and only this identifies it.
CREATE OR REPLACE FUNCTION pg_task_workflow(step text) RETURNS text LANGUAGE plpgsql STABLE AS $$
BEGIN
    RETURN (regexp_match(left(step, 2000), '^\s*\{\s*("(?:[^"\\]|\\.)*")\s*:\s*\{\s*"Run"\s*:'))[1]::json #>> '{}';
EXCEPTION WHEN data_exception THEN
    RETURN NULL;
END
$$;

-- Return the end of a run's pause, as of now: a statement that has waited for the lock of its task would see the value
-- from before the wait.
CREATE OR REPLACE FUNCTION pg_task_paused_until(run uuid) RETURNS timestamptz LANGUAGE sql VOLATILE AS $$
    SELECT paused_until FROM pg_task_runs WHERE id = run
$$;

-- Passes the end of a revived run on to its record. It runs by the rights of its owner, as pg_task_run_parked() of
-- 010_parked_runs.sql does.
CREATE OR REPLACE FUNCTION pg_task_run_revived() RETURNS trigger LANGUAGE plpgsql SECURITY DEFINER AS $$
BEGIN
    IF TG_RELID <> 'pg_task'::regclass THEN
        RETURN NULL;
    END IF;
    UPDATE pg_task_runs
    SET state = NULL,
        error = NULL,
        ended_at = NULL
    WHERE id = NEW.id
      AND state = 'ERROR';
    RETURN NULL;
END
$$;

DO $$
DECLARE
    home constant text := current_setting('search_path');
BEGIN
    EXECUTE format('ALTER FUNCTION pg_task_run_revived() SET search_path = %s, pg_temp', home);
END
$$;

-- A role needs the right to make a trigger, not to fire it.
REVOKE EXECUTE ON FUNCTION pg_task_run_revived() FROM PUBLIC;

CREATE OR REPLACE TRIGGER pg_task_run_revived AFTER UPDATE OF error ON pg_task
    FOR EACH ROW WHEN (OLD.error IS NOT NULL AND NEW.error IS NULL)
    EXECUTE FUNCTION pg_task_run_revived();
