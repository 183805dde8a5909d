-- Remove those of the tasks $1, whose rows this transaction has locked by turn_lock.sql, that are members of the groups $3,
-- which are being cancelled. Returns the ids. The lock is the fence, so it counts in that transaction only, which has the
-- setting $2.
WITH gone AS (
    DELETE FROM pg_task
    WHERE id = ANY ($1::uuid[])
      AND current_setting('pgtask.held', true) = $2
      AND abs(group_id) = ANY ($3::bigint[])
    RETURNING id, group_id
),
-- include: shared/cancelled.sql
SELECT id
FROM gone
