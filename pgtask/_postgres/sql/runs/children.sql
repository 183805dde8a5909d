-- The children of the runs $1 that have not ended.
SELECT child.id
FROM pg_task_runs AS child
JOIN pg_task AS task USING (id)
WHERE child.parent = ANY ($1::uuid[])
