-- Up to $2 keys of the limit $1 that something is to be said about: those that are paused or have failed, and those with
-- tasks that run or wait; the paused ones first, then those for which most tasks wait. It looks at $3 keys, and returns at
-- how many it has. Running and waiting tasks are counted to $4 a key. `blocked_by` is a task that holds up those behind it in
-- strict order: it is parked, or waits for its retry.
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
    ORDER BY paused_until DESC NULLS LAST
    LIMIT $3
),
keys AS MATERIALIZED (
    SELECT limit_key
    FROM (
        SELECT limit_key, 1 AS place FROM marked
        UNION ALL
        SELECT limit_key, 2 FROM (SELECT * FROM held LIMIT $3) AS first
        UNION ALL
        SELECT limit_key, 3 FROM (SELECT * FROM queued LIMIT $3) AS first
    ) AS found
    GROUP BY limit_key
    ORDER BY min(place), limit_key
    LIMIT $3
)
SELECT
    substr(limit_key, length($1) + 2) AS key,
    (
        SELECT count(*)
        FROM (
            SELECT
            FROM pg_task
            WHERE limit_key = keys.limit_key AND wakeup_at = 'infinity' AND locked_by IS NOT NULL
            LIMIT $4
        ) AS held
    ) AS running,
    (
        SELECT count(*)
        FROM (
            SELECT
            FROM pg_task
            WHERE limit_key = keys.limit_key AND wakeup_at = 'infinity' AND locked_by IS NULL AND error IS NULL
            LIMIT $4
        ) AS queued
    ) AS waiting,
    state.failures,
    CASE WHEN state.paused_until > now() THEN state.paused_until END AS paused_until,
    greatest(state.next_at, state.cost_next_at) AS next_at,
    blocking.id AS blocked_by,
    blocking.is_parked,
    count(*) OVER () AS looked_at
FROM keys
LEFT JOIN pg_task_limit_keys AS state USING (limit_key)
LEFT JOIN LATERAL (
    SELECT id, error IS NOT NULL AS is_parked
    FROM pg_task
    WHERE limit_key = keys.limit_key
      AND wakeup_at < 'infinity'
      AND (SELECT is_strict FROM pg_task_limits WHERE name = $1)
    LIMIT 1
) AS blocking ON true
ORDER BY state.paused_until > now() DESC NULLS LAST, waiting DESC, running DESC, limit_key
LIMIT $2
