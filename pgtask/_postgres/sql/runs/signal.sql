-- Send the signal $2 with the payload $3 to the run $1, and wake it if it is paused. What comes back: whether the task $1 is a run; no row
-- if it is no longer there. Its row is locked first, so that nothing is sent to one that ends meanwhile.
--
-- Whoever pauses the run compares its wakeup_at with what it was when he looked for signals; under a lease it is changed
-- for him to see. One that is not paused, but scheduled or to be tried again, is left to its time.
WITH asked AS MATERIALIZED (
    SELECT
        id,
        EXISTS (SELECT FROM pg_task_runs WHERE pg_task_runs.id = pg_task.id) OR pg_task_workflow(step) IS NOT NULL AS is_run
    FROM pg_task
    WHERE id = $1
    FOR NO KEY UPDATE
),
sent AS (
    INSERT INTO pg_task_signals (run, name, payload)
    SELECT id, $2, $3
    FROM asked
    WHERE is_run
    RETURNING run
),
woken AS (
    UPDATE pg_task AS task
    SET wakeup_at = CASE
        WHEN task.locked_by IS NOT NULL THEN greatest(clock_timestamp(), task.wakeup_at + interval '1 microsecond')
        WHEN task.wakeup_at = pg_task_paused_until(task.id) THEN least(task.wakeup_at, now())
        ELSE task.wakeup_at
    END
    FROM sent
    WHERE task.id = sent.run
)
SELECT is_run
FROM asked
