-- Cancel the group $1, unless it has ended; without the step at its end unless $2. Returns its id, and whether that was done.
-- Tells all workers, who start no member of it any more, and remove those that wait.
WITH cancelled AS (
    UPDATE pg_task_groups
    SET state = 'cancelling',
        cancelled_at = coalesce(cancelled_at, now()),
        then_step = CASE WHEN $2 THEN then_step END
    WHERE name = $1
      AND ended_at IS NULL
    RETURNING id
)
SELECT id, id IN (SELECT id FROM cancelled), pg_notify('pg_task_changed', 'paused')::text
FROM pg_task_groups
WHERE name = $1
