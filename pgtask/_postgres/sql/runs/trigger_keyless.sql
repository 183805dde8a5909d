-- Enqueue a run like trigger.sql, without a key. Traced: trace $8.
WITH enqueued AS (
    INSERT INTO pg_task (
        id, step, wakeup_at, queue, priority
        -- traced: , trace
    )
    VALUES (
        $1, $3, coalesce($4, clock_timestamp() + make_interval(secs => coalesce($5::float8, 0))), $6, $7
        -- traced: , $8
    )
    RETURNING id
),
recorded AS (
    INSERT INTO pg_task_runs (id, name)
    SELECT id, $2
    FROM enqueued
)
SELECT id
FROM enqueued
