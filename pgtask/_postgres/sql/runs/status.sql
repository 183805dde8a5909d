-- Read the status of the runs $1. While the task of a run exists it decides the state; afterwards the record does, and a
-- task that plain SQL has removed counts as cancelled.
--
-- Plan: OFFSET 0 has the planner look up each of these rows by itself, by the primary key, with any statistics.
SELECT
    coalesce(run.id, task.id) AS id,
    coalesce(run.name, pg_task_workflow(task.step)) AS name,
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
    (
        SELECT json_object_agg(name, signals)::text
        FROM (
            SELECT name, count(*) AS signals
            FROM pg_task_signals
            WHERE pg_task_signals.run = requested.id
            GROUP BY name
            ORDER BY min(pg_task_signals.id)
        ) AS unread
    ) AS unread_signals,
    now() AS seen_at
FROM unnest($1::uuid[]) WITH ORDINALITY AS requested (id, place)
LEFT JOIN LATERAL (SELECT * FROM pg_task WHERE pg_task.id = requested.id OFFSET 0) AS task ON true
LEFT JOIN LATERAL (SELECT * FROM pg_task_runs WHERE pg_task_runs.id = requested.id OFFSET 0) AS run ON true
LEFT JOIN LATERAL (
    SELECT number, name
    FROM pg_task_checkpoints
    WHERE pg_task_checkpoints.run = requested.id
    ORDER BY number DESC
    LIMIT 1
) AS last ON true
WHERE task.id IS NOT NULL
   OR run.id IS NOT NULL
ORDER BY place
