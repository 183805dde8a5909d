-- A write of `error` parks a run: by a flush, the reaper or a person. A trigger passes it on to the record of the run, the
-- parent that waits for it and the clients that wait for its result. The server checks its condition for rows that leave a
-- worker for another try or another queue, never for those that are claimed, kept or finished.
--
-- A session with SET pgtask.nowait = on, as ours have, waits for no row here: one that another session has locked ends the
-- statement (lock_not_available), and the worker writes its other outcomes first. All other sessions wait.
--
-- The task of the run is locked, as it is being written. The trigger locks the parent's task next, before a record. A
-- statement of a person that locks them in the opposite order can deadlock; every writer here retries. The record says
-- whether this has been done, so that journal/end.sql, which does it itself, does not count twice.
--
-- It runs by the rights of its owner: a role that may park tasks needs no rights on runs. So it must not read temporary
-- tables of that role, nor work as the trigger of another table.
CREATE OR REPLACE FUNCTION pg_task_run_parked() RETURNS trigger LANGUAGE plpgsql SECURITY DEFINER AS $$
DECLARE
    waiting uuid;
    left_to integer;
    paused  timestamptz;
BEGIN
    IF TG_RELID <> 'pg_task'::regclass THEN
        RETURN NULL;
    END IF;
    IF current_setting('pgtask.nowait', true) = 'on' THEN
        SELECT CASE WHEN awaited THEN parent END INTO waiting
        FROM pg_task_runs
        WHERE id = NEW.id AND state IS NULL
        FOR NO KEY UPDATE NOWAIT;
        PERFORM FROM pg_task WHERE id = waiting FOR NO KEY UPDATE NOWAIT;
        PERFORM FROM pg_task_runs WHERE id = waiting FOR NO KEY UPDATE NOWAIT;
    ELSE
        PERFORM FROM pg_task
        WHERE id = (SELECT parent FROM pg_task_runs WHERE id = NEW.id AND state IS NULL)
        FOR NO KEY UPDATE;
    END IF;

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

DO $$
BEGIN
    EXECUTE format('ALTER FUNCTION pg_task_run_parked() SET search_path = %s, pg_temp', current_setting('search_path'));
END
$$;

-- A role needs the right to make a trigger, not to fire it.
REVOKE EXECUTE ON FUNCTION pg_task_run_parked() FROM PUBLIC;

CREATE OR REPLACE TRIGGER pg_task_run_parked AFTER UPDATE OF error ON pg_task
    FOR EACH ROW WHEN (OLD.error IS NULL AND NEW.error IS NOT NULL)
    EXECUTE FUNCTION pg_task_run_parked();
