-- Find the tasks of $1 that another session has locked at this moment, without waiting for them.
WITH free AS MATERIALIZED (
    SELECT id
    FROM pg_task
    WHERE id = ANY ($1::uuid[])
    FOR UPDATE SKIP LOCKED
)
SELECT id
FROM pg_task
WHERE id = ANY ($1::uuid[])
  AND id NOT IN (SELECT id FROM free)
