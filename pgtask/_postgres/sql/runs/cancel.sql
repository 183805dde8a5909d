-- Cancel those of the runs $1 that have not ended; those under a live lease only if $2. Returns the ids of the cancelled
-- ones. A run that plain SQL has inserted and that has not begun gets its record here.
--
-- Lock order: the tasks in the order of their ids, before the records; so a worker spawns no more children of these runs.
-- Wakes the parents that wait for them, and notifies the callers that wait for their results.
--
-- Plan: OFFSET 0 has the planner look up each of these rows by itself, by the primary key, with any statistics.
WITH free AS MATERIALIZED (
    SELECT id
    FROM pg_task
    WHERE id = ANY ($1::uuid[])
      AND ($2 OR locked_by IS NULL OR lock_expires_at < now())
      AND (EXISTS (SELECT FROM pg_task_runs WHERE pg_task_runs.id = pg_task.id OFFSET 0) OR pg_task_workflow(step) IS NOT NULL)
    ORDER BY id
    FOR UPDATE
),
removed AS (
    DELETE FROM pg_task
    WHERE id = ANY (ARRAY (SELECT id FROM free))
    RETURNING id, step, queue, priority, key, created_at
),
ended AS (
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
-- include: shared/ended.sql
SELECT id, (SELECT count(*) FROM notified)
FROM removed
