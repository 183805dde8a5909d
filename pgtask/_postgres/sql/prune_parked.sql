-- Remove tasks that were parked before $1, as prune_archive.sql does. Parking sets `wakeup_at`, so that is when.
--
-- A run goes with its record and all it has recorded; not as long as its parent might ask for it, see prune_runs.sql.
WITH pruned AS (
    DELETE FROM pg_task
    WHERE id = ANY (ARRAY (
        SELECT id
        FROM pg_task
        WHERE error IS NOT NULL
          AND locked_by IS NULL
          AND wakeup_at < $1
          AND wakeup_at >= $3
          AND NOT EXISTS (
              SELECT
              FROM pg_task_runs AS run
              JOIN pg_task_runs AS parent ON parent.id = run.parent
              WHERE run.id = pg_task.id
                AND parent.state IS DISTINCT FROM 'SUCCESS'
          )
        ORDER BY wakeup_at
        LIMIT $2
        FOR UPDATE SKIP LOCKED
    ))
    RETURNING id, wakeup_at
),
checkpoints AS (
    DELETE FROM pg_task_checkpoints WHERE run = ANY (ARRAY (SELECT id FROM pruned))
),
signals AS (
    DELETE FROM pg_task_signals WHERE run = ANY (ARRAY (SELECT id FROM pruned))
),
removed AS (
    DELETE FROM pg_task_runs WHERE id = ANY (ARRAY (SELECT id FROM pruned))
)
SELECT count(*), max(wakeup_at)
FROM pruned
