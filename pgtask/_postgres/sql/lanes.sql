-- Poll the lanes (queue, priority): those of the queues $3 (null: all) that hold a task that falls due from $1 seconds
-- before now() until $2 seconds before it; and the known lanes $4, $5, each from its floor in $6 on (seconds since the
-- epoch), or from $7 seconds before now() if that is earlier.
--
-- Returns the queue and the priority of each lane, the seconds until its first such task falls due, that time (seconds
-- since the epoch), the seconds that it took to find them all, and whether it was searched for as a known lane; if there
-- is none, one row without a lane. The first difference is that of numbers, since timestamps cannot be subtracted from
-- infinity, which an operator may write to put a task on hold.
--
-- A loose index scan: a few probes of pg_task_ready_idx per lane, independent of the number of tasks. Each probe reads
-- the dead entries between its bounds. From one lane it goes to the next priority, then to the next queue: a comparison
-- of both columns as one would keep PostgreSQL 18 from skipping to the bounds.
WITH RECURSIVE lane AS (
    (
        (
            SELECT queue, priority, wakeup_at
            FROM pg_task
            WHERE $3::text[] IS NULL
-- include: shared/ready_in_window.sql
            ORDER BY queue, priority, wakeup_at
            LIMIT 1
        )
        UNION ALL
        SELECT first.*
        FROM unnest($3::text[]) AS served (queue)
        CROSS JOIN LATERAL (
            SELECT queue, priority, wakeup_at
            FROM pg_task
            WHERE queue = served.queue
-- include: shared/ready_in_window.sql
            ORDER BY priority, wakeup_at
            LIMIT 1
        ) AS first
    )
    UNION ALL
    SELECT following.*
    FROM lane
    CROSS JOIN LATERAL (
        (
            SELECT queue, priority, wakeup_at
            FROM pg_task
            WHERE queue = lane.queue
              AND priority > lane.priority
-- include: shared/ready_in_window.sql
            ORDER BY priority, wakeup_at
            LIMIT 1
        )
        UNION ALL
        (
            SELECT queue, priority, wakeup_at
            FROM pg_task
            WHERE $3::text[] IS NULL
              AND queue > lane.queue
-- include: shared/ready_in_window.sql
            ORDER BY queue, priority, wakeup_at
            LIMIT 1
        )
        LIMIT 1
    ) AS following
),
found AS MATERIALIZED (
    SELECT queue, priority, wakeup_at, false AS is_known
    FROM lane
    UNION ALL
    SELECT known.queue, known.priority, first.wakeup_at, true
    FROM unnest($4::text[], $5::smallint[], $6::float8[]) AS known (queue, priority, floor)
    CROSS JOIN LATERAL (
        SELECT wakeup_at
        FROM pg_task
        WHERE queue = known.queue
          AND priority = known.priority
          AND wakeup_at >= to_timestamp(least(known.floor, extract(epoch FROM now())::float8 - $7))
          AND locked_by IS NULL
          AND error IS NULL
        ORDER BY wakeup_at
        LIMIT 1
    ) AS first
)
SELECT
    queue,
    priority,
    (extract(epoch FROM wakeup_at) - extract(epoch FROM now()))::float8,
    extract(epoch FROM wakeup_at)::float8,
    took,
    is_known
FROM (SELECT date_part('epoch', clock_timestamp() - statement_timestamp()) + 0 * count(*) AS took FROM found) AS timed
LEFT JOIN found ON true
