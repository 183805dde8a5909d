-- List at most $2 runs before the id $1 of the workflow $3, the latest first.
SELECT id
FROM pg_task_runs
WHERE name = $3
  AND id < $1
ORDER BY id DESC
LIMIT $2
