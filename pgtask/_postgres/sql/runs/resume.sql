-- Resume those of the runs $1 that have ended as ERROR or were cancelled, after their last checkpoint, with all their
-- retries, now. Wake those that pause or wait for another try, and their steps that are put off. A run that is only
-- scheduled is left to its time. Returns the runs that are resumed or woken.
--
-- Notifies the workers itself, since the triggers pass over a task whose lease has expired and is still there.
--
-- The records of cancelled runs are locked before their tasks are put back, so that prune_runs.sql passes them over. A run
-- whose key another task has is not put back: see taken_keys.sql.
--
-- Plan: OFFSET 0 has the planner look up each of these rows by itself, by the primary key, with any statistics.
WITH free AS MATERIALIZED (
    SELECT task.id
    FROM pg_task AS task
    LEFT JOIN LATERAL (SELECT * FROM pg_task_runs WHERE pg_task_runs.id = task.id OFFSET 0) AS run ON true
    WHERE task.id = ANY ($1::uuid[])
      AND (run.id IS NOT NULL OR pg_task_workflow(task.step) IS NOT NULL)
      AND (task.locked_by IS NULL OR task.lock_expires_at < now())
      AND (task.error IS NOT NULL OR (task.wakeup_at > now() AND (task.tried > 0 OR task.wakeup_at = run.paused_until)))
    ORDER BY task.id
    FOR NO KEY UPDATE OF task
),
revived AS (
    -- include: shared/made_due.sql
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
    ON CONFLICT (key) WHERE key IS NOT NULL DO NOTHING
    RETURNING id
),
resumed AS (
    SELECT id FROM revived
    UNION ALL
    SELECT id FROM put_back
),
retried_now AS (
    UPDATE pg_task_checkpoints AS checkpoint
    SET due_at = now(),
        tried = 0
    WHERE checkpoint.run = ANY (ARRAY (SELECT id FROM resumed))
      AND checkpoint.kind = 'step'
      AND checkpoint.due_at IS NOT NULL
),
reopened AS (
    UPDATE pg_task_runs AS run
    SET state = NULL,
        error = NULL,
        ended_at = NULL
    WHERE run.id = ANY (ARRAY (SELECT id FROM resumed))
      AND run.state IS NOT NULL
)
SELECT id, pg_notify('pg_task_changed', '')::text
FROM resumed
