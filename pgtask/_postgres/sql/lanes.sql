-- The lanes (queue, priority) that hold waiting tasks, in how many seconds the first task of each falls due, when that
-- is (seconds since the epoch), and how many seconds it took to find them all.
--
-- A loose index scan: one probe of pg_task_ready_idx per lane, whatever the number of tasks. The difference is taken
-- of numbers, since timestamps cannot be subtracted from infinity, which an operator may write to put a task on hold.
WITH RECURSIVE lane AS (
    (
        SELECT queue, priority, wakeup_at
        FROM pg_task
        WHERE locked_by IS NULL
          AND error IS NULL
        ORDER BY queue, priority, wakeup_at
        LIMIT 1
    )
    UNION ALL
    SELECT following.*
    FROM lane
    CROSS JOIN LATERAL (
        SELECT queue, priority, wakeup_at
        FROM pg_task
        WHERE locked_by IS NULL
          AND error IS NULL
          AND (queue, priority) > (lane.queue, lane.priority)
        ORDER BY queue, priority, wakeup_at
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
