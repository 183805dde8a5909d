-- Count those of the tasks $1 that still exist.
SELECT count(*)
FROM pg_task
WHERE id = ANY ($1::uuid[])
