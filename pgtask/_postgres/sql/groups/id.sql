-- Return the id of the group $1, and whether it keeps results.
SELECT id, results
FROM pg_task_groups
WHERE name = $1
