-- Find the children of the runs $1 that have not ended.
--
-- Plan: OFFSET 0 has the planner look up each of these rows by itself, by the primary key, with any statistics.
SELECT child.id
FROM pg_task_runs AS child
CROSS JOIN LATERAL (SELECT FROM pg_task WHERE pg_task.id = child.id OFFSET 0) AS task
WHERE child.parent = ANY ($1::uuid[])
