-- Return the step of the task $1, by the primary key.
SELECT step
FROM pg_task
WHERE id = $1
