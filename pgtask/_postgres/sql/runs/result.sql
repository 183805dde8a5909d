-- Those of the runs $1 that have ended: state, output and error. A task that is parked has; one that was inserted by plain
-- SQL may have no record then. A run whose task is gone without an end was cancelled by other means than ours.
SELECT
    asked.id,
    CASE WHEN task.error IS NOT NULL THEN 'ERROR' WHEN run.state = 'SUCCESS' THEN 'SUCCESS' ELSE 'CANCELLED' END,
    run.output,
    coalesce(task.error, run.error)
FROM unnest($1::uuid[]) AS asked (id)
LEFT JOIN pg_task AS task ON task.id = asked.id
LEFT JOIN pg_task_runs AS run ON run.id = asked.id
WHERE task.error IS NOT NULL
   OR (task.id IS NULL AND run.id IS NOT NULL)
