-- Keys of a task or workflow of their own, tasks that wait behind another one with their key, and tasks that expire.
--
--   key         the escaped name of the task or workflow, a slash, and the key that the caller gave. A task behind another
--               one has a slash before that.
--   behind      the time at which such a task is due once the other one is gone; meanwhile `wakeup_at` is infinity
--   expires_at  no worker starts the task after that; in no index, so that a step under a lease stays a HOT update
--
-- The new columns have no default: the server rewrites no row. Old keys are rewritten in the transaction that adds the
-- columns, so once.

-- Return the name of the task or workflow of a step; null if it cannot be read.
CREATE OR REPLACE FUNCTION pg_task_family(step text) RETURNS text LANGUAGE plpgsql IMMUTABLE AS $$
BEGIN
    RETURN (regexp_match(left(step, 2000), '^\s*\{\s*("(?:[^"\\]|\\.)*")\s*:'))[1]::json #>> '{}';
EXCEPTION WHEN data_exception THEN
    RETURN NULL;
END
$$;

-- Return a key as the column has it: that of one task or workflow.
CREATE OR REPLACE FUNCTION pg_task_scoped_key(family text, key text) RETURNS text LANGUAGE sql IMMUTABLE AS $$
    SELECT replace(replace(family, '%', '%25'), '/', '%2F') || '/' || key
$$;

DO $$
BEGIN
    IF NOT EXISTS (
        SELECT FROM pg_attribute
        WHERE attrelid = 'pg_task'::regclass AND attname = 'behind' AND NOT attisdropped
    ) THEN
        ALTER TABLE pg_task
            ADD COLUMN behind     timestamptz,
            ADD COLUMN expires_at timestamptz;
        -- In two passes, since a new key may be the old one of another row. The name of a step that cannot be read is '%',
        -- which no escaped name is; so is that of a key that would be too long for the index.
        UPDATE pg_task
        SET key = E'\x01pgtask\x01' || key
        WHERE key IS NOT NULL;
        UPDATE pg_task
        SET key = CASE
            WHEN octet_length(pg_task_scoped_key(pg_task_family(step), substr(key, 9))) <= 2600
                THEN pg_task_scoped_key(pg_task_family(step), substr(key, 9))
            ELSE '%/' || substr(key, 9)
        END
        WHERE key IS NOT NULL;
        UPDATE pg_task_runs
        SET key = pg_task_scoped_key(name, key)
        WHERE key IS NOT NULL;
    END IF;
END
$$;

CREATE INDEX IF NOT EXISTS pg_task_behind_idx ON pg_task (behind, id) WHERE behind IS NOT NULL;
