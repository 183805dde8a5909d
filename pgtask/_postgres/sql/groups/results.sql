-- Read up to $3 results of the group $1 behind the task $2, in the order of the tasks. Plan: the primary key.
SELECT task_id, value
FROM pg_task_group_results
WHERE group_id = $1
  AND task_id > $2
ORDER BY task_id
LIMIT $3
