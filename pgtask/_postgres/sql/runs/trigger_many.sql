-- Enqueue runs $1 of the workflow $2, with the steps $3, in the queue $4 with the priority $5, due now.
WITH enqueued AS (
    INSERT INTO pg_task (id, step, queue, priority)
    SELECT id, step, $4, $5
    FROM unnest($1::uuid[], $3::text[]) AS run (id, step)
)
INSERT INTO pg_task_runs (id, name)
SELECT id, $2
FROM unnest($1::uuid[]) AS run (id)
