-- What workers and consumers obey: the kind and the name of each thing that is paused, and the names of the limits: of
-- those with a row, and of those for which tasks wait, by a loose index scan. A row of the kind 'groups' says that there are
-- groups of tasks that have not ended.
WITH RECURSIVE waited AS (
    (
        SELECT split_part(limit_key, ' ', 1) COLLATE "C" AS name
        FROM pg_task
        WHERE limit_key IS NOT NULL
          AND wakeup_at = 'infinity' AND locked_by IS NULL AND error IS NULL
        ORDER BY limit_key
        LIMIT 1
    )
    UNION ALL
    SELECT following.name
    FROM waited
    CROSS JOIN LATERAL (
        SELECT split_part(limit_key, ' ', 1) COLLATE "C" AS name
        FROM pg_task
        WHERE limit_key > waited.name || '!'
          AND wakeup_at = 'infinity' AND locked_by IS NULL AND error IS NULL
        ORDER BY limit_key
        LIMIT 1
    ) AS following
)
SELECT kind, name
FROM pg_task_pauses
UNION ALL
SELECT 'limit', name
FROM pg_task_limits
UNION
SELECT 'limit', name
FROM waited
UNION ALL
SELECT 'groups', ''
WHERE EXISTS (SELECT FROM pg_task_groups WHERE ended_at IS NULL)
