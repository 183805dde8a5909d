-- Of the first $2 runs with ids from $3 on, before $4, remove those that ended before $1, with all they have recorded and
-- signals they have not taken. How many; whether there was a parent among them that might have gone on; how many were
-- looked at, and the last of them.
--
-- A run has ended when its task is gone. One whose parent might go on stays, since a replay of that one may ask for it
-- again: only a parent that has ended well, or is removed itself, never does. One without an end (somebody has deleted
-- its task) counts as old as it is. If somebody resumes a run meanwhile, its end has changed, and it stays.
WITH looked AS MATERIALIZED (
    SELECT id, parent, state, created_at, ended_at
    FROM pg_task_runs
    WHERE id >= $3
      AND id < $4
    ORDER BY id
    LIMIT $2
),
pruned AS MATERIALIZED (
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
checkpoints AS (
    DELETE FROM pg_task_checkpoints WHERE run = ANY (ARRAY (SELECT id FROM pruned))
),
signals AS (
    DELETE FROM pg_task_signals WHERE run = ANY (ARRAY (SELECT id FROM pruned))
),
removed AS (
    DELETE FROM pg_task_runs WHERE id = ANY (ARRAY (SELECT id FROM pruned))
)
SELECT
    (SELECT count(*) FROM pruned),
    (SELECT coalesce(bool_or(state IS DISTINCT FROM 'SUCCESS'), false) FROM pruned),
    count(*),
    (SELECT id FROM looked ORDER BY id DESC LIMIT 1)
FROM looked
