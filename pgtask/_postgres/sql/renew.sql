-- Prolong the leases of the tasks $1 under the tokens $2 to $3 seconds from now. Returns the tasks that are still ours,
-- and whether each was renewed: it skips rows that another session has locked, so that they do not hold up the others.
WITH free AS MATERIALIZED (
    SELECT id
    FROM pg_task
    -- include: shared/our_leases.sql
    FOR NO KEY UPDATE SKIP LOCKED
),
renewed AS (
    UPDATE pg_task
    SET lock_expires_at = greatest(lock_expires_at, clock_timestamp() + make_interval(secs => $3))
    FROM set_config('synchronous_commit', 'off', true)
    WHERE id = ANY (ARRAY (SELECT id FROM free))
    RETURNING id
)
SELECT id, id IN (SELECT id FROM renewed)
FROM pg_task
    -- include: shared/our_leases.sql
