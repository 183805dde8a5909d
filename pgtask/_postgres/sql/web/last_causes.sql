-- Read as causes.sql does, but only the $8 tasks that were parked last.
--
-- Plan: pg_task_parked_idx backwards, until $8 tasks are found.
SELECT
    id,
    wakeup_at,
    CASE WHEN octet_length(step) <= 2000 THEN step ELSE left(step, 512) END,
    split_part(CASE WHEN octet_length(error) <= 2000 THEN error ELSE left(error, 2000) END, E'\n', 1)
FROM pg_task
WHERE error IS NOT NULL
      AND $1::boolean
-- include: shared/matching.sql
ORDER BY wakeup_at DESC
LIMIT $8
