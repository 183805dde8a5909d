-- How the runs $1 have ended: state (null: not yet), output and error. Their tasks have the last word: one may have been
-- parked, revived or removed by other means than ours. One without a record will tell nobody of its end.
SELECT
    asked.id,
    CASE
        WHEN task.error IS NOT NULL THEN 'ERROR'
        WHEN run.id IS NOT NULL AND task.id IS NOT NULL THEN NULL
        WHEN run.state = 'SUCCESS' THEN 'SUCCESS'
        ELSE 'CANCELLED'
    END,
    run.output,
    coalesce(task.error, run.error)
FROM unnest($1::uuid[]) AS asked (id)
LEFT JOIN pg_task_runs AS run ON run.id = asked.id
LEFT JOIN pg_task AS task ON task.id = asked.id
