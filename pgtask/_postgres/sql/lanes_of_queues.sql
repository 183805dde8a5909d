-- As lanes.sql, for the queues $1 only: one probe per queue and priority.
WITH RECURSIVE lane AS (
    SELECT first.*
    FROM unnest($1::text[]) AS served (queue)
    CROSS JOIN LATERAL (
        SELECT queue, priority, wakeup_at
        FROM pg_task
        WHERE locked_by IS NULL
          AND error IS NULL
          AND queue = served.queue
        ORDER BY priority, wakeup_at
        LIMIT 1
    ) AS first
    UNION ALL
    SELECT following.*
    FROM lane
    CROSS JOIN LATERAL (
        SELECT queue, priority, wakeup_at
        FROM pg_task
        WHERE locked_by IS NULL
          AND error IS NULL
          AND queue = lane.queue
          AND priority > lane.priority
        ORDER BY priority, wakeup_at
        LIMIT 1
    ) AS following
)
SELECT
    queue,
    priority,
    (extract(epoch FROM wakeup_at) - extract(epoch FROM now()))::float8,
    extract(epoch FROM wakeup_at)::float8,
    (SELECT date_part('epoch', clock_timestamp() - statement_timestamp()) + 0 * count(*) FROM lane)
FROM lane
