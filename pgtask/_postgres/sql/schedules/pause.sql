-- Pause the schedules named $1, in the name of $2. Returns those that were not paused. Locks in the order of the names.
WITH these AS MATERIALIZED (
    SELECT name
    FROM pg_task_schedules
    WHERE name = ANY ($1::text[])
      AND paused_at IS NULL
    ORDER BY name
    FOR NO KEY UPDATE
)
UPDATE pg_task_schedules AS s
SET paused_at = statement_timestamp(),
    paused_by = $2
FROM these
WHERE s.name = these.name
RETURNING s.name
