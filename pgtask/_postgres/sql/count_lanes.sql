-- Count the waiting tasks of each lane (queues $1, priorities $2), no further than $3 for each number, with the time at
-- which the oldest fell due, and the time at which the next one will.
SELECT
    lane.queue,
    lane.priority,
    (
        SELECT count(*)
        FROM (
            SELECT
            FROM pg_task
            WHERE locked_by IS NULL
              AND error IS NULL
              AND queue = lane.queue
              AND priority = lane.priority
              AND wakeup_at <= now()
            LIMIT $3
        ) AS counted
    ) AS ready,
    (
        SELECT count(*)
        FROM (
            SELECT
            FROM pg_task
            WHERE locked_by IS NULL
              AND error IS NULL
              AND queue = lane.queue
              AND priority = lane.priority
              AND wakeup_at > now()
            LIMIT $3
        ) AS counted
    ) AS scheduled,
    (
        SELECT wakeup_at
        FROM pg_task
        WHERE locked_by IS NULL
          AND error IS NULL
          AND queue = lane.queue
          AND priority = lane.priority
          AND wakeup_at <= now()
        ORDER BY wakeup_at
        LIMIT 1
    ) AS oldest_due,
    (
        SELECT wakeup_at
        FROM pg_task
        WHERE locked_by IS NULL
          AND error IS NULL
          AND queue = lane.queue
          AND priority = lane.priority
          AND wakeup_at > now()
        ORDER BY wakeup_at
        LIMIT 1
    ) AS next_due
FROM unnest($1::text[], $2::smallint[]) AS lane (queue, priority)
