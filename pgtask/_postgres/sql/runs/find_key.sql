-- Find the task that has the key $1, and the workflow that it is a run of; null for a plain task.
--
-- Plan: OFFSET 0 has the planner look up each of these rows by itself, by the primary key, with any statistics.
SELECT task.id, coalesce(run.name, pg_task_workflow(task.step)) AS workflow
FROM pg_task AS task
LEFT JOIN LATERAL (SELECT * FROM pg_task_runs WHERE pg_task_runs.id = task.id OFFSET 0) AS run ON true
WHERE task.key = $1
