-- Find those of the runs $1 that were cancelled and are not put back: the key, and the task that has it now; null if no task
-- has it.
--
-- Plan: OFFSET 0 has the planner look up each of these rows by itself, by a unique index, with any statistics.
SELECT run.id, run.key, task.id
FROM pg_task_runs AS run
LEFT JOIN LATERAL (SELECT id FROM pg_task WHERE pg_task.key = run.key OFFSET 0) AS task ON true
WHERE run.id = ANY ($1::uuid[])
  AND run.state = 'CANCELLED'
  AND run.step IS NOT NULL
  AND NOT EXISTS (SELECT FROM pg_task AS own WHERE own.id = run.id OFFSET 0)
