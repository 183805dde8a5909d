-- Send the signal $2 with the payload $3 to the run $1, and wake it if it is paused. Returns whether the task $1 is a run;
-- no row if the task is gone. Its row is locked first, so that no signal goes to a run that ends meanwhile.
--
-- suspend.sql compares wakeup_at with the value that it had when the run looked for signals; changing it here, even under
-- a lease, makes that check fail. A run that is not paused, but scheduled or waiting for another try, is left to its time.
--
-- Plan: OFFSET 0 has the planner look up each of these rows by itself, by the primary key, with any statistics.
WITH target AS MATERIALIZED (
    SELECT
        id,
        EXISTS (SELECT FROM pg_task_runs WHERE pg_task_runs.id = pg_task.id OFFSET 0) OR pg_task_workflow(step) IS NOT NULL AS is_run
    FROM pg_task
    WHERE id = $1
    FOR NO KEY UPDATE
),
sent AS (
    INSERT INTO pg_task_signals (run, name, payload)
    SELECT id, $2, $3
    FROM target
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
    WHERE task.id = ANY (ARRAY (SELECT run FROM sent))
)
SELECT is_run
FROM target
