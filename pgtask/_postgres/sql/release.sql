-- Give back leases that were not used (prefetched and not started, or stopped by the operator), as if never claimed.
-- Says how many; and, if some were lost, which were not.
WITH released AS (
    UPDATE pg_task AS task
    SET locked_by = NULL,
        lock_expires_at = NULL,
        claims = greatest(claims - 1, 0)
    FROM unnest($1::uuid[], $2::uuid[]) AS lease (id, token)
    WHERE task.id = lease.id
      AND task.locked_by = lease.token
    RETURNING task.id
)
SELECT
    count(*),
    pg_notify('pg_task_changed', '')::text,
    CASE WHEN count(*) < cardinality($1::uuid[]) THEN coalesce(array_agg(id), '{}') END
FROM released
