-- Enqueue a run: id $1, workflow $2, step $3, at the time $4 or after $5 seconds (both null: now), queue $6, priority $7,
-- key $8. Traced: trace $9. Returns the id; no row if a task with that key is in the table, or if a trigger, rule or policy of the user's
-- keeps the row out.
WITH enqueued AS (
    INSERT INTO pg_task (
        id, step, wakeup_at, queue, priority, key
        -- traced: , trace
    )
    VALUES (
        $1, $3, coalesce($4, clock_timestamp() + make_interval(secs => coalesce($5::float8, 0))), $6, $7, $8
        -- traced: , $9
    )
    ON CONFLICT (key) WHERE key IS NOT NULL DO NOTHING
    RETURNING id
),
recorded AS (
    INSERT INTO pg_task_runs (id, name)
    SELECT id, $2
    FROM enqueued
)
SELECT id
FROM enqueued
