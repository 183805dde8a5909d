-- All columns of the tasks $1, in that order, with their states by the clock of this server. Of steps and errors the
-- first $2 characters (null: all). `behind_id` is the task behind which one waits, null if that has just gone.
--
-- Plan: OFFSET 0 has the planner look up each of these rows by itself, by the primary key, with any statistics; and,
-- only for one that waits behind another, that one by the index of keys.
SELECT
    task.id,
    CASE
        WHEN error IS NOT NULL THEN 'parked'
        WHEN locked_by IS NOT NULL THEN 'leased'
        WHEN wakeup_at > now() THEN 'scheduled'
        ELSE 'ready'
    END AS state,
    coalesce(left(step, $2), step) AS step,
    queue,
    priority,
    key,
    tried,
    claims,
    position,
    CASE WHEN progress ->> 'lease' = locked_by::text THEN progress::text END AS progress,
    wakeup_at,
    created_at,
    updated_at,
    locked_by,
    lock_expires_at,
    behind,
    (SELECT first.id FROM pg_task AS first WHERE task.behind IS NOT NULL AND first.key = substr(task.key, 2)) AS behind_id,
    expires_at,
    CASE WHEN wakeup_at = 'infinity' THEN limit_key END AS limit_key,
    CASE WHEN wakeup_at = 'infinity' AND limit_key IS NOT NULL THEN limit_at END AS limit_at,
    coalesce(left(error, $2), error) AS error,
    now() AS seen_at
FROM unnest($1::uuid[]) WITH ORDINALITY AS requested (id, place)
CROSS JOIN LATERAL (SELECT * FROM pg_task WHERE pg_task.id = requested.id OFFSET 0) AS task
ORDER BY place
