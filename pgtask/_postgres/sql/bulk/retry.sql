-- Make those of the tasks $1 due that the filter $2 to $7 still chooses, as retry.sql does; returns the number. Passes
-- over what is due with all its retries, what a worker holds, and rows that another session has locked.
WITH free AS MATERIALIZED (
    SELECT id
    FROM pg_task
    WHERE id = ANY ($1::uuid[])
-- include: shared/matching.sql
-- include: shared/retriable.sql
    ORDER BY id
    FOR NO KEY UPDATE SKIP LOCKED
),
retried AS (
    -- include: shared/made_due.sql
)
SELECT count(*), CASE WHEN count(*) > 0 THEN pg_notify('pg_task_changed', '')::text END
FROM retried
