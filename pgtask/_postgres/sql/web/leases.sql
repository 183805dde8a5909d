-- Fold the first $1 leases, soonest-expiring first, by their worker, the first half of the token: tasks, those whose lease
-- has expired, one of their queues, and the first end of a lease.
--
-- Plan: pg_task_lease_idx, $1 entries at most. Locks nothing.
SELECT
    left(locked_by::text, 18) AS worker,
    count(*)::int AS tasks,
    (count(*) FILTER (WHERE lock_expires_at <= now()))::int AS expired,
    min(queue) AS queue,
    min(lock_expires_at) AS ends_at,
    now() AS seen_at
FROM (
    SELECT locked_by, queue, lock_expires_at
    FROM pg_task
    WHERE locked_by IS NOT NULL
    ORDER BY lock_expires_at
    LIMIT $1
) AS first
GROUP BY 1
ORDER BY tasks DESC, worker
LIMIT 100
