-- The answer of a change of the tasks of the CTE `requested`: whether each is in the CTE `changed`, and how it was just before. Tells
-- idle workers of those that were changed.
SELECT
    requested.id,
    requested.id IN (SELECT id FROM changed) AS is_done,
    task.id IS NOT NULL AS was_there,
    task.lock_expires_at AS leased_until,
    now() AS seen_at,
    CASE WHEN requested.id IN (SELECT id FROM changed) THEN pg_notify('pg_task_changed', '')::text END
FROM requested
LEFT JOIN LATERAL (SELECT * FROM pg_task WHERE pg_task.id = requested.id OFFSET 0) AS task ON true
