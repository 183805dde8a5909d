-- End those of the groups $1 of which nothing waits or runs, and enqueue the step that follows each. It looks at the tasks
-- of a group only if so few are left, by its counts, as $2 says (null: of all).
--
-- Returns for each group its id, how many members are left by its counts, and whether it has ended.
--
-- The rows of members are the truth, in one snapshot: a task of a group comes from a member alone, by the statement
-- that writes its outcome, so a group without members gets none any more. The session that writes the last outcome looks after its
-- commit, and sees those of all others. Two that see the end at once take turns at the row of the group, and the second one
-- finds it ended. Plan: the primary key from the right end of the ids of the start, and the first entry of the
-- group in each of two indexes.
WITH wanted AS MATERIALIZED (
    SELECT
        grouped.id,
        grouped.total + counted.added - counted.done - counted.cancelled AS left,
        least(counted.parked, 1000000) AS parked,
        grouped.first_task,
        grouped.last_task,
        grouped.on_parked,
        grouped.ended_at
    FROM pg_task_groups AS grouped
-- include: shared/group_sums.sql
    WHERE grouped.id = ANY ($1::bigint[])
),
over AS MATERIALIZED (
    SELECT id
    FROM wanted AS known
    WHERE ended_at IS NULL
      AND ($2::bigint IS NULL OR known.left - known.parked <= $2)
      AND NOT (
-- include: shared/has_live.sql
      )
      AND (
          on_parked = 'go on'
          OR NOT EXISTS (SELECT FROM pg_task WHERE abs(group_id) = known.id AND group_id IS NOT NULL AND error IS NOT NULL)
      )
    ORDER BY id
),
ended AS (
    UPDATE pg_task_groups
    SET state = CASE WHEN state = 'cancelling' THEN 'cancelled' ELSE 'ended' END,
        ended_at = clock_timestamp(),
        then_task = CASE WHEN then_step IS NOT NULL THEN gen_random_uuid() END
    WHERE id = ANY (ARRAY (SELECT id FROM over))
      AND ended_at IS NULL
    RETURNING id, then_step, then_queue, then_priority, then_task
),
enqueued AS (
    INSERT INTO pg_task (id, step, queue, priority)
    SELECT then_task, then_step, then_queue, then_priority
    FROM ended
    WHERE then_step IS NOT NULL
)
SELECT id, wanted.left - wanted.parked, ended_at IS NOT NULL OR id IN (SELECT id FROM ended)
FROM wanted
