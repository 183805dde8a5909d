-- The trace context of the producer of a task: traceparent of W3C, and tracestate after a space if there is one. Only a
-- producer that traces writes it, and only a worker that traces reads it. In no index, without a default: a task without
-- it takes no space for it.
DO $$
BEGIN
    IF NOT EXISTS (
        SELECT FROM pg_attribute
        WHERE attrelid = 'pg_task'::regclass AND attname = 'trace' AND NOT attisdropped
    ) THEN
        ALTER TABLE pg_task ADD COLUMN trace text;
    END IF;
END
$$;
