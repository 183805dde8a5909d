-- Remove the tasks $1, those under a live lease only if $2. The outcome of a worker that holds the lease of a removed
-- task no longer matches a row and is dropped. What comes back is as in retry.sql.
WITH asked AS (
    SELECT DISTINCT id
    FROM unnest($1::uuid[]) AS asked (id)
),
free AS MATERIALIZED (
    SELECT id
    FROM pg_task
    WHERE id = ANY ($1::uuid[])
      AND ($2 OR locked_by IS NULL OR lock_expires_at < now())
    ORDER BY id
    FOR UPDATE
),
cancelled AS (
    DELETE FROM pg_task AS task
    USING free
    WHERE task.id = free.id
    RETURNING task.id
)
SELECT
    asked.id,
    cancelled.id IS NOT NULL AS is_done,
    task.id IS NOT NULL AS was_there,
    task.lock_expires_at AS leased_until,
    now() AS seen_at
FROM asked
LEFT JOIN cancelled USING (id)
LEFT JOIN pg_task AS task USING (id)
