-- List at most $2 runs before the id $1, the latest first.
SELECT id
FROM pg_task_runs
WHERE id < $1
ORDER BY id DESC
LIMIT $2
