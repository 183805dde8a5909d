-- Make the tasks $1 due, without an error and with all their retries; a task under a live lease is left alone.
--
-- Says of each whether it was done, whether the task was there, and until when it was leased. Locks in the order of
-- ids, so that two such statements do not deadlock.
WITH asked AS (
    SELECT DISTINCT id
    FROM unnest($1::uuid[]) AS asked (id)
),
free AS MATERIALIZED (
    SELECT id
    FROM pg_task
    WHERE id = ANY ($1::uuid[])
      AND (locked_by IS NULL OR lock_expires_at < now())
    ORDER BY id
    FOR NO KEY UPDATE
),
retried AS (
    UPDATE pg_task AS task
    SET error = NULL,
        tried = 0,
        claims = 0,
        wakeup_at = least(wakeup_at, now()),
        locked_by = NULL,
        lock_expires_at = NULL
    FROM free
    WHERE task.id = free.id
    RETURNING task.id
)
SELECT
    asked.id,
    retried.id IS NOT NULL AS is_done,
    task.id IS NOT NULL AS was_there,
    task.lock_expires_at AS leased_until,
    now() AS seen_at,
    CASE WHEN retried.id IS NOT NULL THEN pg_notify('pg_task_changed', '')::text END
FROM asked
LEFT JOIN retried USING (id)
LEFT JOIN pg_task AS task USING (id)
