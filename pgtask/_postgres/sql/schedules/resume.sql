-- Resume the schedules named $1 that are paused or removed. Returns them. Locks in the order of the names.
WITH these AS MATERIALIZED (
    SELECT name
    FROM pg_task_schedules
    WHERE name = ANY ($1::text[])
      AND coalesce(paused_at, removed_at) IS NOT NULL
    ORDER BY name
    FOR NO KEY UPDATE
)
UPDATE pg_task_schedules AS s
SET paused_at = NULL,
    paused_by = NULL,
    removed_at = NULL,
    look_at = next_at
FROM these
WHERE s.name = these.name
RETURNING s.name
