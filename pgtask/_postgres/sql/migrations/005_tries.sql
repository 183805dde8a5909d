-- Retries of the steps of runs: the checkpoint that the result will complete counts the tries and holds the time of the
-- next one. A constant default: the server rewrites no row.
DO $$
BEGIN
    IF NOT EXISTS (
        SELECT FROM pg_attribute
        WHERE attrelid = 'pg_task_checkpoints'::regclass AND attname = 'tried' AND NOT attisdropped
    ) THEN
        ALTER TABLE pg_task_checkpoints ADD COLUMN tried integer NOT NULL DEFAULT 0;
    END IF;
END
$$;
