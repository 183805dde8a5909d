-- The limits, or the one named $1: their rules; how many of their tasks run and wait, and how many keys are paused, counted
-- to $2 each; how many of these keys have an open breaker; and when it is now.
--
-- Plan: the two indexes of limited tasks, and pg_task_limit_paused_idx, which has the keys with a pause alone.
SELECT
    name,
    concurrency,
    rate,
    burst,
    cost_rate,
    cost_burst,
    cost_of,
    failures,
    pause,
    is_shared,
    weights::text,
    is_strict,
    paused_until,
    changed,
    changed_by,
    updated_at,
    (
        SELECT count(*)
        FROM (
            SELECT
            FROM pg_task
            WHERE limit_key >= one.name || ' ' AND limit_key < one.name || '!'
              AND wakeup_at = 'infinity' AND locked_by IS NOT NULL
            LIMIT $2
        ) AS held
    ) AS running,
    (
        SELECT count(*)
        FROM (
            SELECT
            FROM pg_task
            WHERE limit_key >= one.name || ' ' AND limit_key < one.name || '!'
              AND wakeup_at = 'infinity' AND locked_by IS NULL AND error IS NULL
            LIMIT $2
        ) AS queued
    ) AS waiting,
    paused.keys AS paused_keys,
    paused.open AS open_keys,
    now() AS seen_at
FROM pg_task_limits AS one
CROSS JOIN LATERAL (
    SELECT count(*) AS keys, count(*) FILTER (WHERE state.failures >= one.failures) AS open
    FROM (
        SELECT failures
        FROM pg_task_limit_keys
        WHERE limit_key >= one.name || ' ' AND limit_key < one.name || '!'
          AND paused_until IS NOT NULL
          AND paused_until > now()
        LIMIT $2
    ) AS state
) AS paused
WHERE $1::text IS NULL OR name = $1
ORDER BY name
