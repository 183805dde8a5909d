-- Return those of the queues $1 that have no task.
--
-- Plan: pg_task_ready_idx for a queue with a waiting task; else a scan, which a check of the table is too.
SELECT queue
FROM unnest($1::text[]) AS wanted (queue)
WHERE NOT EXISTS (SELECT FROM pg_task WHERE pg_task.queue = wanted.queue AND locked_by IS NULL AND error IS NULL)
  AND NOT EXISTS (SELECT FROM pg_task WHERE pg_task.queue = wanted.queue)
