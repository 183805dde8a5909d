-- Find the tasks that have one of the keys $1.
SELECT key, id
FROM pg_task
WHERE key = ANY ($1::text[])
