-- Count the leased tasks, the expired leases and the parked tasks of each lane: at most $1 leased and $1 parked tasks
-- in all.
SELECT
    queue,
    priority,
    count(*) FILTER (WHERE error IS NULL) AS leased,
    count(*) FILTER (WHERE error IS NULL AND lock_expires_at < now()) AS expired,
    count(*) FILTER (WHERE error IS NOT NULL) AS parked
FROM (
    (
        SELECT queue, priority, lock_expires_at, error
        FROM pg_task
        WHERE locked_by IS NOT NULL
          AND error IS NULL
        ORDER BY lock_expires_at
        LIMIT $1
    )
    UNION ALL
    (
        SELECT queue, priority, NULL, ''
        FROM pg_task
        WHERE error IS NOT NULL
        ORDER BY wakeup_at DESC
        LIMIT $1
    )
) AS held
GROUP BY queue, priority
