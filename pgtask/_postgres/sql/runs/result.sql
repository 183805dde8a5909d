-- Read the results of those of the runs $1 that have ended: state, output and error. A parked task is an end, and may have
-- no record if plain SQL has inserted it. A run whose task is gone without an end was cancelled by plain SQL.
--
-- Plan: OFFSET 0 has the planner look up each of these rows by itself, by the primary key, with any statistics.
SELECT
    requested.id,
    CASE WHEN task.error IS NOT NULL THEN 'ERROR' WHEN run.state = 'SUCCESS' THEN 'SUCCESS' ELSE 'CANCELLED' END,
    run.output,
    coalesce(task.error, run.error)
FROM unnest($1::uuid[]) AS requested (id)
LEFT JOIN LATERAL (SELECT * FROM pg_task WHERE pg_task.id = requested.id OFFSET 0) AS task ON true
LEFT JOIN LATERAL (SELECT * FROM pg_task_runs WHERE pg_task_runs.id = requested.id OFFSET 0) AS run ON true
WHERE task.error IS NOT NULL
   OR (task.id IS NULL AND run.id IS NOT NULL)
