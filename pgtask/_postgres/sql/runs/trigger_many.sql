-- Enqueue runs $1 of the workflow $2, with the steps $3, in the queue $4 with the priority $5, due now. Traced: trace $6. Returns the
-- count of inserted tasks: fewer than given if a trigger, rule or policy of the user's keeps some out.
WITH enqueued AS (
    INSERT INTO pg_task (
        id, step, queue, priority
        -- traced: , trace
    )
    SELECT
        id, step, $4, $5
        -- traced: , $6
    FROM unnest($1::uuid[], $3::text[]) AS run (id, step)
    RETURNING id
),
recorded AS (
    INSERT INTO pg_task_runs (id, name)
    SELECT id, $2
    FROM enqueued
)
SELECT count(*)
FROM enqueued
