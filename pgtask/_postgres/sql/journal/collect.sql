-- How the runs $1 have ended: state (null: not yet), output and error.
SELECT id, state, output, error
FROM pg_task_runs
WHERE id = ANY ($1::uuid[])
