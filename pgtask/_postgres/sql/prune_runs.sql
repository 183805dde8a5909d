-- Of the first $2 runs with ids from $3 on, before $4, remove those that ended before $1, with all they have recorded and
-- signals they have not taken; but no more than $5 checkpoints. How many; whether there was a parent among them that might
-- have gone on; the first that is left for that bound; and the last that was looked at, null if there are no more.
--
-- A run has ended when its task is gone. One whose parent might go on stays, since a replay of that one may ask for it
-- again: only a parent that has ended well, or is removed itself, never does. One without an end (somebody has deleted
-- its task) counts as old as it is. If somebody resumes a run meanwhile, its end has changed, and it stays.
--
-- A run with more checkpoints goes in pieces, from its last one on, and cannot be resumed from when that begins.
WITH looked AS MATERIALIZED (
    SELECT id, parent, state, created_at, ended_at
    FROM pg_task_runs
    WHERE id >= $3
      AND id < $4
    ORDER BY id
    LIMIT $2
),
ended AS MATERIALIZED (
    SELECT run.id, run.state
    FROM looked
    JOIN pg_task_runs AS run ON run.id = looked.id AND run.ended_at IS NOT DISTINCT FROM looked.ended_at
    WHERE coalesce(looked.ended_at, looked.created_at) < $1
      AND NOT EXISTS (SELECT FROM pg_task WHERE pg_task.id = looked.id)
      AND NOT EXISTS (
          SELECT FROM pg_task_runs AS parent WHERE parent.id = looked.parent AND parent.state IS DISTINCT FROM 'SUCCESS'
      )
    FOR UPDATE OF run SKIP LOCKED
),
summed AS (
    SELECT id, state, checkpoints, sum(checkpoints) OVER (ORDER BY id) AS total
    FROM ended
    CROSS JOIN LATERAL (
        SELECT coalesce(max(number), 0) AS checkpoints FROM pg_task_checkpoints WHERE run = ended.id
    ) AS last
),
pruned AS MATERIALIZED (
    SELECT id, state, greatest(total - $5, 0) AS leaves
    FROM summed
    WHERE total - checkpoints < $5
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
),
closed AS (
    UPDATE pg_task_runs SET step = NULL WHERE id = ANY (ARRAY (SELECT id FROM pruned WHERE leaves > 0))
),
later AS (
    SELECT ended.id
    FROM ended
    LEFT JOIN pruned USING (id)
    WHERE pruned.leaves IS DISTINCT FROM 0
)
SELECT
    (SELECT count(*) FROM pruned WHERE leaves = 0),
    (SELECT coalesce(bool_or(state IS DISTINCT FROM 'SUCCESS'), false) FROM pruned WHERE leaves = 0),
    (SELECT id FROM later ORDER BY id LIMIT 1),
    (SELECT id FROM looked ORDER BY id OFFSET $2 - 1)
