-- The position of the fence: the number of the flush that last wrote the row under its lease. A constant default: the
-- server rewrites no row, and the lock of the table is short. In no index, so that a step under a lease stays a HOT update.
DO $$
BEGIN
    IF NOT EXISTS (
        SELECT FROM pg_attribute
        WHERE attrelid = 'pg_task'::regclass AND attname = 'position' AND NOT attisdropped
    ) THEN
        ALTER TABLE pg_task ADD COLUMN position bigint NOT NULL DEFAULT 0;
    END IF;
END
$$;
