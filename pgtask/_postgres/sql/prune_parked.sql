-- Remove tasks that were parked before $1, as prune_archive.sql does. Parking sets `wakeup_at`, so that is when.
WITH pruned AS (
    DELETE FROM pg_task
    WHERE id = ANY (ARRAY (
        SELECT id
        FROM pg_task
        WHERE error IS NOT NULL
          AND locked_by IS NULL
          AND wakeup_at < $1
          AND wakeup_at >= $3
        ORDER BY wakeup_at
        LIMIT $2
        FOR UPDATE SKIP LOCKED
    ))
    RETURNING wakeup_at
)
SELECT count(*), max(wakeup_at)
FROM pruned
