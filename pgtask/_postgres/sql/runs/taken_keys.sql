-- Those of the runs $1 that were cancelled with a key and are not back: the key, and the task that has it by now, null if
-- it is free again.
SELECT run.id, run.key, task.id
FROM pg_task_runs AS run
LEFT JOIN pg_task AS task ON task.key = run.key
WHERE run.id = ANY ($1::uuid[])
  AND run.state = 'CANCELLED'
  AND run.step IS NOT NULL
  AND run.key IS NOT NULL
  AND NOT EXISTS (SELECT FROM pg_task AS own WHERE own.id = run.id)
