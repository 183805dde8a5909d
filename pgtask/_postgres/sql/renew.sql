-- Prolong leases by $3 seconds from now. What comes back is still ours; whether it could be renewed is beside it: a row
-- that somebody else has locked is passed over, so that it does not hold up the others.
WITH free AS MATERIALIZED (
    SELECT task.id
    FROM unnest($1::uuid[], $2::uuid[]) AS lease (id, token)
    JOIN pg_task AS task ON task.id = lease.id AND task.locked_by = lease.token
    FOR NO KEY UPDATE OF task SKIP LOCKED
),
renewed AS (
    UPDATE pg_task AS task
    SET lock_expires_at = clock_timestamp() + make_interval(secs => $3)
    FROM free, set_config('synchronous_commit', 'off', true)
    WHERE task.id = free.id
    RETURNING task.id
)
SELECT task.id, task.id = ANY (ARRAY (SELECT id FROM renewed))
FROM unnest($1::uuid[], $2::uuid[]) AS lease (id, token)
JOIN pg_task AS task ON task.id = lease.id AND task.locked_by = lease.token
