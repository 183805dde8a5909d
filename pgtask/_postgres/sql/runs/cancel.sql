-- End those of the runs $1 that have not ended, as cancelled; those under a live lease only if $2. Locks in the order of
-- ids; the tasks go first, so that nobody spawns children of these any more.
--
-- Wakes the parents that wait for them, and tells those who wait for results.
WITH free AS MATERIALIZED (
    SELECT id
    FROM pg_task
    WHERE id = ANY ($1::uuid[])
      AND ($2 OR locked_by IS NULL OR lock_expires_at < now())
      AND EXISTS (SELECT FROM pg_task_runs WHERE pg_task_runs.id = pg_task.id)
    ORDER BY id
    FOR UPDATE
),
removed AS (
    DELETE FROM pg_task AS task
    USING free
    WHERE task.id = free.id
    RETURNING task.id, task.step
),
cancelled AS (
    UPDATE pg_task_runs AS run
    SET state = 'CANCELLED',
        step = removed.step,
        ended_at = now()
    FROM removed
    WHERE run.id = removed.id
    RETURNING run.id, CASE WHEN run.awaited THEN run.parent END AS parent
),
told AS (
    UPDATE pg_task_runs AS run
    SET waits_for = waits_for - child.ended
    FROM (SELECT parent, count(*)::integer AS ended FROM cancelled WHERE parent IS NOT NULL GROUP BY parent) AS child
    WHERE run.id = child.parent
    RETURNING run.id, run.waits_for
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
      AND task.error IS NULL
),
notified AS MATERIALIZED (
    SELECT pg_notify('pg_task_ended', string_agg(id::text, ','))
    FROM (SELECT id, row_number() OVER () / 200 AS part FROM cancelled) AS numbered
    GROUP BY part
)
SELECT id, (SELECT count(*) FROM notified)
FROM removed
