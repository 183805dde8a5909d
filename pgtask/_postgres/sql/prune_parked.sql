-- Remove tasks that were parked before $1, as prune_archive.sql does. Parking sets `wakeup_at`, so that is when.
--
-- A run goes with its record and all it has recorded; not as long as its parent might ask for it, see prune_runs.sql. But
-- no more than $4 checkpoints: what is over of the last one is that of an ended run. How many, how far it came, whether
-- there are more, and the run of which something is left.
WITH looked AS MATERIALIZED (
    SELECT id, wakeup_at
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
),
summed AS (
    SELECT id, wakeup_at, checkpoints, sum(checkpoints) OVER (ORDER BY wakeup_at, id) AS total
    FROM looked
    CROSS JOIN LATERAL (
        SELECT coalesce(max(number), 0) AS checkpoints FROM pg_task_checkpoints WHERE run = looked.id
    ) AS last
),
pruned AS MATERIALIZED (
    SELECT id, wakeup_at, greatest(total - $4, 0) AS leaves
    FROM summed
    WHERE total - checkpoints < $4
),
tasks AS (
    DELETE FROM pg_task WHERE id = ANY (ARRAY (SELECT id FROM pruned))
),
checkpoints AS (
    DELETE FROM pg_task_checkpoints
    USING pruned
    WHERE run = pruned.id
      AND number > pruned.leaves
),
signals AS (
    DELETE FROM pg_task_signals WHERE run = ANY (ARRAY (SELECT id FROM pruned WHERE leaves = 0))
),
removed AS (
    DELETE FROM pg_task_runs WHERE id = ANY (ARRAY (SELECT id FROM pruned WHERE leaves = 0))
)
SELECT
    count(*),
    max(wakeup_at),
    (SELECT count(*) FROM looked) = $2 OR (SELECT count(*) FROM looked) > count(*),
    (SELECT id FROM pruned WHERE leaves > 0)
FROM pruned
