-- Fold the $1 tasks that were parked last by their step and the first line of their error, in which `#` stands for each
-- number: how many, how many were read in all, when the first and the last of them were parked, and the id of one.
--
-- Plan: pg_task_parked_idx backwards, $1 entries at most. Locks nothing.
WITH parked AS MATERIALIZED (
    SELECT id, left(step, 500) AS step, left(error, 400) AS error, wakeup_at
    FROM pg_task
    WHERE error IS NOT NULL
    ORDER BY wakeup_at DESC
    LIMIT $1
)
SELECT
    split_part(step, '"', 2) AS task,
    split_part(step, '"', 4) AS step,
    left(regexp_replace(split_part(error, E'\n', 1), '\d+', '#', 'g'), 200) AS cause,
    count(*)::int AS tasks,
    (SELECT count(*) FROM parked)::int AS read,
    min(wakeup_at) AS first_at,
    max(wakeup_at) AS last_at,
    min(id::text)::uuid AS example,
    now() AS seen_at
FROM parked
GROUP BY 1, 2, 3
ORDER BY tasks DESC, last_at DESC
LIMIT 200
