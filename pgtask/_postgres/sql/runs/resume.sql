-- Let those of the runs $1 go on that have ended as ERROR or were cancelled, from what they have recorded, with all their
-- retries, now; wake those that pause or are to be tried again, and with them the steps that are put off. One that is
-- only scheduled is left to its time. What comes back are the runs for which that was done.
--
-- Those that are put back are locked before that, so that nobody prunes them meanwhile. One whose key another task has is
-- not put back: see taken_keys.sql.
WITH free AS MATERIALIZED (
    SELECT task.id
    FROM pg_task AS task
    LEFT JOIN pg_task_runs AS run ON run.id = task.id
    WHERE task.id = ANY ($1::uuid[])
      AND (run.id IS NOT NULL OR pg_task_workflow(task.step) IS NOT NULL)
      AND (task.locked_by IS NULL OR task.lock_expires_at < now())
      AND (task.error IS NOT NULL OR (task.wakeup_at > now() AND (task.tried > 0 OR task.wakeup_at = run.paused_until)))
    ORDER BY task.id
    FOR NO KEY UPDATE OF task
),
revived AS (
    UPDATE pg_task AS task
    SET error = NULL,
        tried = 0,
        claims = 0,
        wakeup_at = least(wakeup_at, now()),
        locked_by = NULL,
        lock_expires_at = NULL
    FROM free
    WHERE task.id = free.id
    RETURNING task.id
),
put_back AS (
    INSERT INTO pg_task (id, step, queue, priority, key)
    SELECT id, step, coalesce(queue, 'default'), coalesce(priority, 0), key
    FROM pg_task_runs
    WHERE id = ANY ($1::uuid[])
      AND state = 'CANCELLED'
      AND step IS NOT NULL
    ORDER BY id
    FOR NO KEY UPDATE
    ON CONFLICT DO NOTHING
    RETURNING id
),
resumed AS (
    SELECT id FROM revived
    UNION ALL
    SELECT id FROM put_back
),
hastened AS (
    UPDATE pg_task_checkpoints AS checkpoint
    SET due_at = now(),
        tried = 0
    FROM resumed
    WHERE checkpoint.run = resumed.id
      AND checkpoint.kind = 'step'
      AND checkpoint.due_at IS NOT NULL
),
opened AS (
    UPDATE pg_task_runs AS run
    SET state = NULL,
        error = NULL,
        ended_at = NULL
    FROM resumed
    WHERE run.id = resumed.id
      AND run.state IS NOT NULL
)
SELECT id
FROM resumed
