-- Up to $2 keys of the limit $1 that something is to be said about, in their order: those with tasks that run or wait, and
-- those that are paused or have failed. Running and waiting tasks are counted to 10,000 a key.
--
-- A loose index scan over each index: one probe a key.
WITH RECURSIVE queued AS (
    (
        SELECT limit_key
        FROM pg_task
        WHERE limit_key >= $1 || ' ' AND limit_key < $1 || '!'
          AND wakeup_at = 'infinity' AND locked_by IS NULL AND error IS NULL
        ORDER BY limit_key
        LIMIT 1
    )
    UNION ALL
    SELECT following.limit_key
    FROM queued
    CROSS JOIN LATERAL (
        SELECT limit_key
        FROM pg_task
        WHERE limit_key > queued.limit_key AND limit_key < $1 || '!'
          AND wakeup_at = 'infinity' AND locked_by IS NULL AND error IS NULL
        ORDER BY limit_key
        LIMIT 1
    ) AS following
),
held AS (
    (
        SELECT limit_key
        FROM pg_task
        WHERE limit_key >= $1 || ' ' AND limit_key < $1 || '!'
          AND wakeup_at = 'infinity' AND locked_by IS NOT NULL
        ORDER BY limit_key
        LIMIT 1
    )
    UNION ALL
    SELECT following.limit_key
    FROM held
    CROSS JOIN LATERAL (
        SELECT limit_key
        FROM pg_task
        WHERE limit_key > held.limit_key AND limit_key < $1 || '!'
          AND wakeup_at = 'infinity' AND locked_by IS NOT NULL
        ORDER BY limit_key
        LIMIT 1
    ) AS following
),
marked AS (
    SELECT limit_key
    FROM pg_task_limit_keys
    WHERE limit_key >= $1 || ' ' AND limit_key < $1 || '!'
      AND (paused_until > now() OR failures > 0)
    ORDER BY limit_key
    LIMIT $2
),
keys AS MATERIALIZED (
    SELECT limit_key FROM (SELECT * FROM queued LIMIT $2) AS first
    UNION
    SELECT limit_key FROM (SELECT * FROM held LIMIT $2) AS first
    UNION
    SELECT limit_key FROM marked
    ORDER BY limit_key
    LIMIT $2
)
SELECT
    substr(limit_key, length($1) + 2) AS key,
    (
        SELECT count(*)
        FROM (
            SELECT
            FROM pg_task
            WHERE limit_key = keys.limit_key AND wakeup_at = 'infinity' AND locked_by IS NOT NULL
            LIMIT 10000
        ) AS held
    ) AS running,
    (
        SELECT count(*)
        FROM (
            SELECT
            FROM pg_task
            WHERE limit_key = keys.limit_key AND wakeup_at = 'infinity' AND locked_by IS NULL AND error IS NULL
            LIMIT 10000
        ) AS queued
    ) AS waiting,
    state.failures,
    CASE WHEN state.paused_until > now() THEN state.paused_until END AS paused_until,
    greatest(state.next_at, state.cost_next_at) AS next_at
FROM keys
LEFT JOIN pg_task_limit_keys AS state USING (limit_key)
ORDER BY limit_key
