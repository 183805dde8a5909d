-- Make those of the tasks $1 due that wait behind another one with their key, if that is gone. Returns how many.
--
-- Their key becomes that of the other one, so it may meet a task that was enqueued just now: then the statement fails, with
-- 23505, or waits for that session, 20 ms at most. The caller repeats it.
--
-- Plan: by the primary key, since the other conditions match no partial index; and by the index of keys. Locks the rows FOR NO KEY UPDATE and skips locked ones.
WITH free AS MATERIALIZED (
    SELECT id, set_config('lock_timeout', '20ms', true)
    FROM pg_task
    WHERE id = ANY ($1::uuid[])
      AND coalesce(locked_by::text, error) IS NULL
      AND coalesce(behind::text, '') <> ''
      AND NOT EXISTS (SELECT FROM pg_task AS other WHERE other.key = substr(pg_task.key, 2))
    FOR NO KEY UPDATE SKIP LOCKED
),
promoted AS (
    UPDATE pg_task
    SET key = substr(key, 2),
        wakeup_at = CASE WHEN wakeup_at = 'infinity' THEN behind ELSE wakeup_at END,
        behind = NULL
    WHERE id = ANY (ARRAY (SELECT id FROM free))
    RETURNING id
)
SELECT count(*)
FROM promoted
