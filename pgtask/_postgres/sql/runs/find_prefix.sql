-- Find runs of workflows like ../find_prefix.sql finds tasks: those with a record, and those of plain SQL that have not begun.
SELECT id
FROM pg_task_runs
WHERE id BETWEEN $1 AND $2
UNION
SELECT id
FROM pg_task
WHERE id BETWEEN $1 AND $2
  AND pg_task_workflow(step) IS NOT NULL
ORDER BY id
LIMIT $3
