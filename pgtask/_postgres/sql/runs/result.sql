-- Those of the runs $1 that have ended, as their records say: state, output and error. A run whose task is gone without
-- an end was cancelled by other means than ours.
SELECT
    run.id,
    CASE WHEN task.id IS NULL AND run.state IS DISTINCT FROM 'SUCCESS' THEN 'CANCELLED' ELSE run.state END,
    run.output,
    coalesce(task.error, run.error)
FROM pg_task_runs AS run
LEFT JOIN pg_task AS task ON task.id = run.id
WHERE run.id = ANY ($1::uuid[])
  AND (task.id IS NULL OR task.error IS NOT NULL)
