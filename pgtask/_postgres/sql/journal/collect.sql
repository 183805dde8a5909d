-- How the runs $1 have ended: state (null: not yet), output and error. Their tasks have the last word: one may have been
-- parked, revived or removed by other means than ours.
SELECT
    run.id,
    CASE
        WHEN task.error IS NOT NULL THEN 'ERROR'
        WHEN task.id IS NOT NULL THEN NULL
        WHEN run.state = 'SUCCESS' THEN 'SUCCESS'
        ELSE 'CANCELLED'
    END,
    run.output,
    coalesce(task.error, run.error)
FROM pg_task_runs AS run
LEFT JOIN pg_task AS task ON task.id = run.id
WHERE run.id = ANY ($1::uuid[])
