-- Have the tasks $1 under the tokens $2 wait for their limits, with the keys $3 and the costs $4: they were claimed without,
-- or under another key, and have not started. The claim does not count.
--
-- Returns, if it has not found all, which it has found, and which are still ours: it skips rows that another session has
-- locked. Sets updated_at, or a trigger would. Plan: as flush.sql has it.
WITH free AS MATERIALIZED (
    SELECT id
    FROM pg_task
    -- include: shared/our_leases.sql
    FOR NO KEY UPDATE SKIP LOCKED
),
put AS (
    UPDATE pg_task AS task
    -- include: shared/limited.sql
        locked_by = NULL,
        lock_expires_at = NULL,
        claims = greatest(task.claims - 1, 0),
        updated_at = now()
    -- include: shared/limit_entries.sql
    WHERE task.id = ANY (ARRAY[entry.id])
      AND entry.id IN (SELECT id FROM free)
    RETURNING task.id
)
SELECT
    count(*),
    0,
    CASE WHEN count(*) < cardinality($1::uuid[]) THEN coalesce(array_agg(id), '{}') END,
    CASE WHEN count(*) < cardinality($1::uuid[]) THEN ARRAY (
        SELECT id
        FROM pg_task
    -- include: shared/our_leases.sql
          AND id NOT IN (SELECT id FROM put)
    ) END
FROM put
