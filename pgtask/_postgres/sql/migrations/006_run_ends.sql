-- A run is parked, and revived, by whoever writes `error`: a journal, a flush, the undertaker, a person. Its record, the
-- parent that waits for it and those who wait for its result hear of it by a trigger. It is compared with rows that leave
-- a worker's hands for another try or another queue, never with those that are claimed, kept or finished.

ALTER TABLE pg_task_runs
    ADD COLUMN IF NOT EXISTS queue    text,
    ADD COLUMN IF NOT EXISTS priority smallint,
    ADD COLUMN IF NOT EXISTS key      text,
    ADD COLUMN IF NOT EXISTS paused_until timestamptz;

-- What pauses already is known by what it waits for.
UPDATE pg_task_runs AS run
SET paused_until = task.wakeup_at
FROM pg_task AS task
WHERE task.id = run.id
  AND task.locked_by IS NULL
  AND task.wakeup_at > now()
  AND run.waits_on IS NOT NULL
  AND run.paused_until IS NULL;

COMMENT ON COLUMN pg_task_runs.waits_on IS 'For what it paused last.';
COMMENT ON COLUMN pg_task_runs.paused_until IS 'What pg_task.wakeup_at was set to when it paused last; it is paused for as long as it is that, and has no lease and no error.';
COMMENT ON COLUMN pg_task_runs.queue IS 'Of a cancelled run, what was pg_task.queue: it is resumed there.';
COMMENT ON COLUMN pg_task_runs.priority IS 'Of a cancelled run, what was pg_task.priority.';
COMMENT ON COLUMN pg_task_runs.key IS 'Of a cancelled run, what was pg_task.key; free for others until it is resumed.';

-- The workflow of a run, out of its step; null for a task that is none. A run that was inserted by plain SQL has no record
-- before its first claim, and is known by this alone.
CREATE OR REPLACE FUNCTION pg_task_workflow(step text) RETURNS text LANGUAGE plpgsql STABLE AS $$
BEGIN
    RETURN (regexp_match(left(step, 2000), '^\s*\{\s*("(?:[^"\\]|\\.)*")\s*:\s*\{\s*"Run"\s*:'))[1]::json #>> '{}';
EXCEPTION WHEN data_exception THEN
    RETURN NULL;
END
$$;

-- Until when a run is paused, as of now: whoever has waited for the lock of its task would see in his own statement what
-- was true before.
CREATE OR REPLACE FUNCTION pg_task_paused_until(run uuid) RETURNS timestamptz LANGUAGE sql VOLATILE AS $$
    SELECT paused_until FROM pg_task_runs WHERE id = run
$$;

-- The task of the run is locked, as it is being written. That of the parent is locked next, before a record is: as in
-- journal/end.sql. Who comes the other way round meets a deadlock, which all who write here send again. The record says
-- whether this has been done, so that journal/end.sql, which does it itself, is not counted twice.
--
-- By the rights of its owner: who may park a task need not know of runs. So it must not look at temporary tables of his, nor
-- be of use to him as the trigger of another table.
CREATE OR REPLACE FUNCTION pg_task_run_parked() RETURNS trigger LANGUAGE plpgsql SECURITY DEFINER AS $$
DECLARE
    waiting uuid;
    left_to integer;
    paused  timestamptz;
BEGIN
    IF TG_RELID <> 'pg_task'::regclass THEN
        RETURN NULL;
    END IF;
    PERFORM FROM pg_task
    WHERE id = (SELECT parent FROM pg_task_runs WHERE id = NEW.id AND state IS NULL)
    FOR NO KEY UPDATE;

    UPDATE pg_task_runs
    SET state = 'ERROR',
        error = NEW.error,
        ended_at = now()
    WHERE id = NEW.id
      AND state IS NULL
    RETURNING CASE WHEN awaited THEN parent END INTO waiting;
    IF NOT FOUND THEN
        RETURN NULL;
    END IF;
    PERFORM pg_notify('pg_task_ended', NEW.id::text);

    UPDATE pg_task_runs
    SET waits_for = waits_for - 1
    WHERE id = waiting
    RETURNING waits_for, paused_until INTO left_to, paused;
    IF left_to <= 0 THEN
        UPDATE pg_task
        SET wakeup_at = CASE
            WHEN locked_by IS NULL THEN least(wakeup_at, now())
            ELSE greatest(clock_timestamp(), wakeup_at + interval '1 microsecond')
        END
        WHERE id = waiting
          AND (locked_by IS NOT NULL OR wakeup_at = paused);
    END IF;
    RETURN NULL;
END
$$;

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
    EXECUTE format('ALTER FUNCTION pg_task_run_parked() SET search_path = %s, pg_temp', home);
    EXECUTE format('ALTER FUNCTION pg_task_run_revived() SET search_path = %s, pg_temp', home);
END
$$;

-- Who makes a trigger needs the right, who fires it does not.
REVOKE EXECUTE ON FUNCTION pg_task_run_parked(), pg_task_run_revived() FROM PUBLIC;

CREATE OR REPLACE TRIGGER pg_task_run_parked AFTER UPDATE OF error ON pg_task
    FOR EACH ROW WHEN (OLD.error IS NULL AND NEW.error IS NOT NULL)
    EXECUTE FUNCTION pg_task_run_parked();

CREATE OR REPLACE TRIGGER pg_task_run_revived AFTER UPDATE OF error ON pg_task
    FOR EACH ROW WHEN (OLD.error IS NOT NULL AND NEW.error IS NULL)
    EXECUTE FUNCTION pg_task_run_revived();
