-- Count tasks by state, task and step: of each state the first $1, which the lanes of the waiting ones share, and 50 of a
-- lane at least, in the first 200 lanes. `is_cut`: there may be more of this state than were read.
--
-- Plan: pg_task_ready_idx by lane, pg_task_lease_idx and pg_task_parked_idx, each with its limit. Locks nothing.
WITH lane AS MATERIALIZED (
    SELECT queue, priority, greatest(50, $1::int / count(*) OVER ()) AS most
    FROM (SELECT queue, priority FROM pg_task_lanes(NULL) LIMIT 200) AS first
),
span (state, since, until) AS (
    -- Of a time: a task is due at it, and scheduled only behind it.
    VALUES ('due', '-infinity'::timestamptz, now()), ('scheduled', now() + interval '1 microsecond', 'infinity')
),
counted AS (
    SELECT state, step, nth >= most AS is_last
    FROM lane
    CROSS JOIN span
    CROSS JOIN LATERAL (
        SELECT left(step, 500) AS step, row_number() OVER () AS nth
        FROM (
            SELECT step
            FROM pg_task
            WHERE queue = lane.queue
              AND priority = lane.priority
              AND locked_by IS NULL
              AND error IS NULL
              AND wakeup_at BETWEEN span.since AND span.until
            LIMIT lane.most
        ) AS first
    ) AS waiting
    UNION ALL
    SELECT 'leased', left(step, 500), row_number() OVER () >= $1
    FROM (SELECT step FROM pg_task WHERE locked_by IS NOT NULL ORDER BY lock_expires_at LIMIT $1) AS first
    UNION ALL
    SELECT 'parked', left(step, 500), row_number() OVER () >= $1
    FROM (SELECT step FROM pg_task WHERE error IS NOT NULL ORDER BY wakeup_at DESC LIMIT $1) AS first
)
SELECT
    state,
    split_part(step, '"', 2) AS task,
    split_part(step, '"', 4) AS step,
    count(*)::int AS tasks,
    bool_or(bool_or(is_last)) OVER (PARTITION BY state) AS is_cut
FROM counted
GROUP BY state, 2, 3
