-- The hot table: created in an empty database, or the table of the Rust crate pg_task, adopted in place.
--
-- The first nine columns are those of pg_task 1.0; ours come after them, each with a default, so that
-- INSERT INTO pg_task (step) VALUES (...) works from any language. Three rules hold it together:
--   ready    locked_by IS NULL AND error IS NULL      in pg_task_ready_idx, ordered by wakeup_at within its lane
--   leased   locked_by IS NOT NULL                    in pg_task_lease_idx, ordered by the end of the lease
--   parked   error IS NOT NULL                        in pg_task_parked_idx, waits for a person
-- A finished task leaves the table. The next step under a kept lease changes only step, tried, claims and updated_at;
-- no index contains one of these, so it is a heap-only (HOT) update: keep it so.

-- Constant defaults: the server rewrites no row.
DO $$
DECLARE
    found   constant text := current_setting('pgtask.found');
    running bigint;
BEGIN
    IF found = 'nothing' THEN
        RAISE INFO 'created the table pg_task in the schema %', current_schema();
        RETURN;
    END IF;
    IF found LIKE 'pgtask %' THEN
        RETURN;
    END IF;

    ALTER TABLE pg_task
        ADD COLUMN IF NOT EXISTS locked_by       uuid,
        ADD COLUMN IF NOT EXISTS lock_expires_at timestamptz,
        ADD COLUMN IF NOT EXISTS queue           text        NOT NULL DEFAULT 'default',
        ADD COLUMN IF NOT EXISTS priority        smallint    NOT NULL DEFAULT 0,
        ADD COLUMN IF NOT EXISTS key             text,
        ADD COLUMN IF NOT EXISTS claims          integer     NOT NULL DEFAULT 0,
        ALTER COLUMN wakeup_at SET DEFAULT clock_timestamp();

    -- A running row of 0.2 does not say whether it still runs: it becomes an expired lease, which is freed at once.
    IF found = 'pg_task 0.2' THEN
        UPDATE pg_task
        SET locked_by = gen_random_uuid(),
            lock_expires_at = now()
        WHERE is_running
          AND error IS NULL
          AND locked_by IS NULL;
        GET DIAGNOSTICS running = ROW_COUNT;
        ALTER TABLE pg_task DROP COLUMN is_running;
        RAISE INFO 'released % running tasks, to be run again', running;
    END IF;

    IF NOT EXISTS (
        SELECT FROM pg_constraint
        WHERE conrelid = 'pg_task'::regclass AND conname = 'pg_task_lease_state_check'
    ) THEN
        ALTER TABLE pg_task
            ADD CONSTRAINT pg_task_lease_state_check CHECK ((locked_by IS NULL) = (lock_expires_at IS NULL));
    END IF;

    RAISE INFO 'adopted the table of % in the schema %', found, current_schema();
END
$$;

-- Tasks are due at once, but one after the other, also when one transaction makes a million: claims continue from the
-- last time.
CREATE TABLE IF NOT EXISTS pg_task (
    id              uuid        PRIMARY KEY DEFAULT gen_random_uuid(),
    step            text        NOT NULL,
    wakeup_at       timestamptz NOT NULL DEFAULT clock_timestamp(),
    tried           integer     NOT NULL DEFAULT 0,
    error           text,
    created_at      timestamptz NOT NULL DEFAULT now(),
    updated_at      timestamptz NOT NULL DEFAULT now(),
    locked_by       uuid,
    lock_expires_at timestamptz,
    queue           text        NOT NULL DEFAULT 'default',
    priority        smallint    NOT NULL DEFAULT 0,
    key             text,
    claims          integer     NOT NULL DEFAULT 0,
    CONSTRAINT pg_task_lease_state_check CHECK ((locked_by IS NULL) = (lock_expires_at IS NULL))
);

-- In the order of time, where the server can (PostgreSQL 18): a million random ids would be read and written at a
-- million places of the primary key.
DO $$
BEGIN
    IF current_setting('server_version_num')::integer >= 180000
        AND 'uuidv7()' IS DISTINCT FROM (
            SELECT pg_get_expr(adbin, adrelid)
            FROM pg_attrdef
            JOIN pg_attribute ON attrelid = adrelid AND attnum = adnum
            WHERE adrelid = 'pg_task'::regclass AND attname = 'id'
        )
    THEN
        ALTER TABLE pg_task ALTER COLUMN id SET DEFAULT uuidv7();
    END IF;
END
$$;
