-- Send the signal $2 with the payload $3 to the run $1, and wake it. No row comes back if it is no longer there.
--
-- Whoever pauses the run compares its wakeup_at with what it was when he looked for signals; under a lease it is changed
-- for him to see. One that was never claimed is left to its time: its row was not written since it was made.
WITH sent AS (
    INSERT INTO pg_task_signals (run, name, payload)
    SELECT id, $2, $3
    FROM pg_task
    WHERE id = $1
    RETURNING run
)
UPDATE pg_task AS task
SET wakeup_at = CASE
    WHEN task.locked_by IS NOT NULL THEN greatest(clock_timestamp(), task.wakeup_at + interval '1 microsecond')
    WHEN task.error IS NULL AND task.updated_at <> task.created_at THEN least(task.wakeup_at, now())
    ELSE task.wakeup_at
END
FROM sent
WHERE task.id = sent.run
RETURNING task.id
