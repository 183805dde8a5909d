-- Find runs of workflows like ../find_ending.sql finds tasks: those with a record, and those of plain SQL that have not begun.
SELECT id
FROM pg_task_runs
WHERE id::text LIKE '%' || $1
UNION
SELECT id
FROM pg_task
WHERE id::text LIKE '%' || $1
  AND pg_task_workflow(step) IS NOT NULL
ORDER BY id
LIMIT $2
