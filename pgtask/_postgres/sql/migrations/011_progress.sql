-- The progress that a step reports: {"done":3,"total":10,"lease":<token>}. The worker writes it as it renews the lease, and
-- clears it when the task goes on. It counts while the token is that of the row: a worker that does not know the column,
-- and plain SQL, need not clear it. In no index, so that a renewal stays a HOT update.
DO $$
BEGIN
    IF NOT EXISTS (
        SELECT FROM pg_attribute
        WHERE attrelid = 'pg_task'::regclass AND attname = 'progress' AND NOT attisdropped
    ) THEN
        ALTER TABLE pg_task ADD COLUMN progress jsonb;
    END IF;
END
$$;
