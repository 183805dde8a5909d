-- Read the ends of the runs $1: state (null: not ended), output and error. Their tasks decide: plain SQL may have parked,
-- revived or removed one. A run without a record counts as ended, as it will notify no parent.
SELECT
    requested.id,
    CASE
        WHEN task.error IS NOT NULL THEN 'ERROR'
        WHEN run.id IS NOT NULL AND task.id IS NOT NULL THEN NULL
        WHEN run.state = 'SUCCESS' THEN 'SUCCESS'
        ELSE 'CANCELLED'
    END,
    run.output,
    coalesce(task.error, run.error)
FROM unnest($1::uuid[]) AS requested (id)
LEFT JOIN LATERAL (
    SELECT id, state, output, error FROM pg_task_runs WHERE id BETWEEN requested.id AND requested.id ORDER BY id LIMIT 1
) AS run ON true
LEFT JOIN LATERAL (SELECT id, error FROM pg_task WHERE id = requested.id OFFSET 0) AS task ON true
