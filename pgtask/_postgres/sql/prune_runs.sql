-- Of the first $2 runs with ids from $3 on, before $4, remove those that ended before $1, with their checkpoints and
-- unread signals, but at most $5 checkpoints. Returns the number; whether one of them was a parent that might have gone
-- on; the first run that this bound has left; and the last run that was read, null if there are no more.
--
-- A run has ended when its task is gone. A run whose parent might go on stays, since a replay of the parent may read it
-- again: only a parent that has ended well, or is removed itself, never does. The age of a run without an end (its task
-- was deleted by hand) counts from its creation. A run that is resumed meanwhile has another end, and stays.
--
-- A run with more checkpoints is removed in pieces, the last checkpoints first, and cannot be resumed once that begins.
WITH examined AS MATERIALIZED (
    SELECT id, parent, state, created_at, ended_at
    FROM pg_task_runs
    WHERE id >= $3
      AND id < $4
    ORDER BY id
    LIMIT $2
),
ended AS MATERIALIZED (
    SELECT run.id, run.state
    FROM examined
    JOIN pg_task_runs AS run ON run.id = examined.id AND run.ended_at IS NOT DISTINCT FROM examined.ended_at
    WHERE coalesce(examined.ended_at, examined.created_at) < $1
      AND NOT EXISTS (SELECT FROM pg_task WHERE pg_task.id = examined.id)
      AND NOT EXISTS (
          SELECT
          FROM pg_task_runs AS parent
          WHERE parent.id = examined.parent
            AND parent.state IS DISTINCT FROM 'SUCCESS'
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
    (SELECT id FROM examined ORDER BY id OFFSET $2 - 1)
