-- The limits, or the one named $1: their rules, how many of their tasks run and wait (10,000 at most), and when it is now.
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
            LIMIT 10000
        ) AS held
    ) AS running,
    (
        SELECT count(*)
        FROM (
            SELECT
            FROM pg_task
            WHERE limit_key >= one.name || ' ' AND limit_key < one.name || '!'
              AND wakeup_at = 'infinity' AND locked_by IS NULL AND error IS NULL
            LIMIT 10000
        ) AS queued
    ) AS waiting,
    now() AS seen_at
FROM pg_task_limits AS one
WHERE $1::text IS NULL OR name = $1
ORDER BY name
