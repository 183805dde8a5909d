-- End those of the runs $1 that have not ended, as cancelled; those under a live lease only if $2. Locks in the order of
-- ids; the tasks go first, so that nobody spawns children of these any more. A run that was inserted by plain SQL and has
-- not begun gets its record here.
--
-- Wakes the parents that are paused and wait for them, and tells those who wait for results.
WITH free AS MATERIALIZED (
    SELECT id
    FROM pg_task
    WHERE id = ANY ($1::uuid[])
      AND ($2 OR locked_by IS NULL OR lock_expires_at < now())
      AND (EXISTS (SELECT FROM pg_task_runs WHERE pg_task_runs.id = pg_task.id) OR pg_task_workflow(step) IS NOT NULL)
    ORDER BY id
    FOR UPDATE
),
removed AS (
    DELETE FROM pg_task AS task
    USING free
    WHERE task.id = free.id
    RETURNING task.id, task.step, task.queue, task.priority, task.key, task.created_at
),
cancelled AS (
    INSERT INTO pg_task_runs AS run (id, name, state, step, queue, priority, key, created_at, ended_at)
    SELECT id, coalesce(pg_task_workflow(step), ''), 'CANCELLED', step, queue, priority, key, created_at, now()
    FROM removed
    ON CONFLICT (id) DO UPDATE
    SET state = excluded.state,
        step = excluded.step,
        queue = excluded.queue,
        priority = excluded.priority,
        key = excluded.key,
        ended_at = excluded.ended_at
    RETURNING run.id, CASE WHEN run.awaited THEN run.parent END AS parent
),
told AS (
    UPDATE pg_task_runs AS run
    SET waits_for = waits_for - child.ended
    FROM (SELECT parent, count(*)::integer AS ended FROM cancelled WHERE parent IS NOT NULL GROUP BY parent) AS child
    WHERE run.id = child.parent
    RETURNING run.id, run.waits_for, run.paused_until
),
woken AS (
    UPDATE pg_task AS task
    SET wakeup_at = CASE
        WHEN task.locked_by IS NULL THEN least(task.wakeup_at, now())
        ELSE greatest(clock_timestamp(), task.wakeup_at + interval '1 microsecond')
    END
    FROM told
    WHERE task.id = told.id
      AND told.waits_for <= 0
      AND (task.locked_by IS NOT NULL OR task.wakeup_at = told.paused_until)
),
notified AS MATERIALIZED (
    SELECT pg_notify('pg_task_ended', string_agg(id::text, ','))
    FROM (SELECT id, row_number() OVER () / 200 AS part FROM cancelled) AS numbered
    GROUP BY part
)
SELECT id, (SELECT count(*) FROM notified)
FROM removed
