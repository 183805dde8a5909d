-- Find those of the tasks $1 that are runs of workflows, with the ends of their leases, by the clock of the server.
--
-- Plan: OFFSET 0 has the planner look up each of these rows by itself, by the primary key, with any statistics.
SELECT
    task.id,
    task.lock_expires_at AS leased_until,
    now() AS seen_at
FROM unnest($1::uuid[]) AS requested (id)
CROSS JOIN LATERAL (SELECT * FROM pg_task WHERE pg_task.id = requested.id OFFSET 0) AS task
WHERE EXISTS (SELECT FROM pg_task_runs WHERE pg_task_runs.id = task.id OFFSET 0)
   OR pg_task_workflow(task.step) IS NOT NULL
