-- List at most $2 runs before the id $1, of the workflow $3 (null: of any), that have no record: plain SQL has inserted
-- them, and no worker has begun them. Looks at the latest $4 tasks before that id.
--
-- Plan: OFFSET 0 has the planner look up each of these rows by itself, by the primary key, with any statistics.
SELECT id
FROM (
    SELECT id, step
    FROM pg_task
    WHERE id < $1
    ORDER BY id DESC
    LIMIT $4
) AS task
WHERE left(step, 2000) LIKE '%"Run"%'  -- cheap, so it comes first
  AND pg_task_workflow(step) = coalesce($3, pg_task_workflow(step))
  AND NOT EXISTS (SELECT FROM pg_task_runs AS run WHERE run.id = task.id OFFSET 0)
ORDER BY id DESC
LIMIT $2
