-- Remove tasks that were parked before $1, as prune_archive.sql does. Parking sets `wakeup_at`.
--
-- A run is removed with its record and its checkpoints, unless its parent might read it, see prune_runs.sql. The batch
-- removes at most $4 checkpoints: the rest of the last run is that of an ended run. Returns the number, the end of this
-- batch, whether there are more, and the run of which records are left.
WITH listed AS MATERIALIZED (
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
    FROM listed
    CROSS JOIN LATERAL (
        SELECT coalesce(max(number), 0) AS checkpoints FROM pg_task_checkpoints WHERE run = listed.id
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
    (SELECT count(*) FROM listed) = $2 OR (SELECT count(*) FROM listed) > count(*),
    (SELECT id FROM pruned WHERE leaves > 0)
FROM pruned
