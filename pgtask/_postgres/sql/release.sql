-- Release the leases of the tasks $1 under the tokens $2 that were not used (prefetched and not started, or stopped by
-- the operator), as if never claimed, and notify the workers of their queues. The tasks $3 among them had begun, so they do
-- not expire any more.
--
-- Returns how many it has released; and, if there are others, which it has released, and which are still ours: it skips
-- rows that another session has locked, so that they do not hold up the others. The rest were lost.
WITH free AS MATERIALIZED (
    SELECT id
    FROM pg_task
    -- include: shared/our_leases.sql
    FOR NO KEY UPDATE SKIP LOCKED
),
released AS (
    UPDATE pg_task
    SET locked_by = NULL,
        lock_expires_at = NULL,
        claims = greatest(claims - 1, 0),
        expires_at = CASE WHEN id <> ALL ($3::uuid[]) THEN expires_at END
    WHERE id = ANY (ARRAY (SELECT id FROM free))
    RETURNING
        id,
        -- include: shared/told.sql
)
SELECT
    count(*),
    count(told),
    CASE WHEN count(*) < cardinality($1::uuid[]) THEN coalesce(array_agg(id), '{}') END,
    CASE WHEN count(*) < cardinality($1::uuid[]) THEN ARRAY (
        SELECT id
        FROM pg_task
    -- include: shared/our_leases.sql
          AND id NOT IN (SELECT id FROM released)
    ) END
FROM released
