-- Make tasks due that wait behind another one with their key, if that is gone; at most $1 of the first ones. Returns how
-- many, and how many still wait among these.
--
-- Their key becomes that of the other one, so it may meet a task that has just been enqueued: then this statement fails,
-- with 23505, or it waits for that session, for a moment only. The caller repeats it.
--
-- Plan: the index of such tasks, then each by the index of keys. Locks the rows FOR NO KEY UPDATE and skips locked ones.
WITH waiting AS MATERIALIZED (
    SELECT id, substr(key, 2) AS other, set_config('lock_timeout', '20ms', true)
    FROM pg_task
    WHERE behind IS NOT NULL
    ORDER BY behind
    LIMIT $1
),
free AS MATERIALIZED (
    SELECT id
    FROM pg_task
    WHERE id = ANY (ARRAY (
            SELECT id
            FROM waiting
            WHERE NOT EXISTS (SELECT FROM pg_task WHERE key = waiting.other)
        ))
      AND behind IS NOT NULL
      AND locked_by IS NULL
    FOR NO KEY UPDATE SKIP LOCKED
),
promoted AS (
    UPDATE pg_task
    SET key = substr(key, 2),
        wakeup_at = behind,
        behind = NULL
    WHERE id = ANY (ARRAY (SELECT id FROM free))
    RETURNING id
)
SELECT (SELECT count(*) FROM promoted), (SELECT count(*) FROM waiting) - (SELECT count(*) FROM promoted)
