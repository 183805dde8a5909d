-- Start the schedule $1 now, out of turn, as the task $2, which is of the time $3. Its next time stays. Returns the id; no
-- row if there is no such schedule that is declared, or if it was started in this second.
WITH locked AS MATERIALIZED (
    SELECT name, step, workflow, queue, priority
    FROM pg_task_schedules
    WHERE name = $1
      AND removed_at IS NULL
      AND last_task IS DISTINCT FROM $2
    FOR NO KEY UPDATE
),
inserted AS (
    INSERT INTO pg_task (id, step, queue, priority)
    SELECT $2, step, queue, priority
    FROM locked
    ON CONFLICT (id) DO NOTHING
    RETURNING id
),
recorded AS (
    INSERT INTO pg_task_runs (id, name)
    SELECT inserted.id, locked.workflow
    FROM inserted
    CROSS JOIN locked
    WHERE locked.workflow IS NOT NULL
),
noted AS (
    UPDATE pg_task_schedules
    SET last_at = $3,
        last_task = $2
    FROM inserted
    WHERE name = $1
)
SELECT id FROM inserted
