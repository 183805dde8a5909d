-- Finish the tasks $1, some of them members of groups, whose rows this transaction has locked by turn_lock.sql; count for the
-- groups $3 how many of each are done, $4, as shared/counted.sql does. Kept: keep the results $7 of the tasks $6 of the
-- groups $5, as JSON, if these keep results.
--
-- The lock is the fence, so it counts in that transaction only, which has the setting $2. What turn_lock.sql has said
-- of the groups is still true, so the rows need not be read again: a DELETE that returns them takes twice the time.
WITH counted AS (
    INSERT INTO pg_task_group_counts AS counts (group_id, slot, done)
    SELECT group_id, pg_backend_pid(), done
    FROM unnest($3::bigint[], $4::bigint[]) AS moved (group_id, done)
    WHERE current_setting('pgtask.held', true) = $2
    ON CONFLICT (group_id, slot) DO UPDATE
    SET done = counts.done + excluded.done
)
-- kept: ,
-- kept: remembered AS (
-- kept:     INSERT INTO pg_task_group_results (group_id, task_id, value)
-- kept:     SELECT group_id, task_id, value
-- kept:     FROM unnest($5::bigint[], $6::uuid[], $7::text[]) AS result (group_id, task_id, value)
-- kept:     WHERE current_setting('pgtask.held', true) = $2
-- kept:       AND group_id = ANY (ARRAY (SELECT id FROM pg_task_groups WHERE id = ANY ($3::bigint[]) AND results))
-- kept: )
DELETE FROM pg_task
WHERE id = ANY ($1::uuid[])
  AND current_setting('pgtask.held', true) = $2
