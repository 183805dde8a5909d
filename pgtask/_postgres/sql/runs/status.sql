-- The runs $1 as they are now. While the task of a run is there it says in which state the run is; afterwards the record
-- does, and a task that was removed by other means than ours was cancelled.
SELECT
    coalesce(run.id, task.id) AS id,
    run.name,
    CASE
        WHEN task.error IS NOT NULL THEN 'ERROR'
        WHEN task.locked_by IS NOT NULL THEN 'RUNNING'
        WHEN task.wakeup_at > now() AND task.wakeup_at = run.paused_until THEN 'PAUSED'
        WHEN task.id IS NOT NULL THEN 'QUEUED'
        WHEN run.state = 'SUCCESS' THEN 'SUCCESS'
        ELSE 'CANCELLED'
    END AS state,
    run.version,
    run.parent,
    last.name AS last_step,
    coalesce(last.number, 0) AS recorded,
    CASE
        WHEN task.locked_by IS NULL AND task.error IS NULL AND task.wakeup_at > now() AND task.wakeup_at = run.paused_until
        THEN run.waits_on
    END AS waits_on,
    CASE WHEN task.locked_by IS NULL AND task.error IS NULL THEN task.wakeup_at END AS due_at,
    coalesce(task.tried, 0) AS tried,
    coalesce(task.error, CASE WHEN task.id IS NULL THEN run.error END) AS error,
    coalesce(run.created_at, task.created_at) AS created_at,
    run.started_at,
    CASE WHEN task.id IS NULL OR task.error IS NOT NULL THEN run.ended_at END AS ended_at,
    coalesce(task.step, run.step) AS step,
    run.output,
    now() AS seen_at
FROM unnest($1::uuid[]) WITH ORDINALITY AS asked (id, place)
LEFT JOIN pg_task AS task ON task.id = asked.id
LEFT JOIN pg_task_runs AS run ON run.id = asked.id
LEFT JOIN LATERAL (
    SELECT number, name
    FROM pg_task_checkpoints
    WHERE pg_task_checkpoints.run = asked.id
    ORDER BY number DESC
    LIMIT 1
) AS last ON true
WHERE task.id IS NOT NULL
   OR run.id IS NOT NULL
ORDER BY place
