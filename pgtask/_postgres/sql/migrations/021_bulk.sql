-- A statement that changes thousands of tasks does for all of them together what two triggers do row by row, which took
-- two thirds of its time: it tells the workers once, and revives the records of all its runs (shared/revived.sql). It says
-- so by SET LOCAL pgtask.bulk = on. The triggers check that last, for the rows that they would else be called for: the
-- statements of workers never come so far, but where they park a task.
--
-- The argument of pg_task_notify, of 009, stays as it is.
DO $$
DECLARE
    until     text;
    arguments text := '';
BEGIN
    SELECT split_part(encode(tgargs, 'escape'), '\000', 1) INTO until
    FROM pg_trigger
    WHERE tgrelid = 'pg_task'::regclass AND tgname = 'pg_task_rescheduled' AND tgnargs > 0;
    IF until IS NOT NULL THEN
        arguments := quote_literal(until);
    END IF;

    EXECUTE format(
        'CREATE OR REPLACE TRIGGER pg_task_rescheduled
             AFTER UPDATE OF step, wakeup_at, tried, error, queue, priority ON pg_task
             FOR EACH ROW
             WHEN (
                 OLD.locked_by IS NULL
                 AND NEW.locked_by IS NULL
                 AND (OLD.error IS NULL OR NEW.error IS NULL)
                 AND (OLD.step, OLD.wakeup_at, OLD.tried, OLD.error, OLD.queue, OLD.priority)
                     IS DISTINCT FROM (NEW.step, NEW.wakeup_at, NEW.tried, NEW.error, NEW.queue, NEW.priority)
                 AND coalesce(current_setting(''pgtask.bulk'', true), '''') <> ''on''
             )
             EXECUTE FUNCTION pg_task_notify(%s)',
        arguments
    );
END
$$;

CREATE OR REPLACE TRIGGER pg_task_run_revived AFTER UPDATE OF error ON pg_task
    FOR EACH ROW WHEN (
        OLD.error IS NOT NULL
        AND NEW.error IS NULL
        AND coalesce(current_setting('pgtask.bulk', true), '') <> 'on'
    )
    EXECUTE FUNCTION pg_task_run_revived();

-- A pause may be of one key of a task or workflow; its name is that of the column, `Task/key`.
DO $$
BEGIN
    IF NOT EXISTS (
        SELECT FROM pg_constraint
        WHERE conrelid = 'pg_task_pauses'::regclass
          AND conname = 'pg_task_pauses_kind_check'
          AND pg_get_constraintdef(oid) LIKE '%''key''%'
    ) THEN
        ALTER TABLE pg_task_pauses
            DROP CONSTRAINT IF EXISTS pg_task_pauses_kind_check,
            ADD CONSTRAINT pg_task_pauses_kind_check CHECK (kind IN ('queue', 'task', 'step', 'key'));
    END IF;
END
$$;
