-- Remove the first group that ended before $1, from the id $2 on, with its counts and its results; but no more than $3 results
-- at once. Returns how many groups it has removed, and the id from which to go on; nothing if there is no such group.
--
-- Parked members stay in the table. Plan: the primary keys.
WITH old AS MATERIALIZED (
    SELECT id
    FROM pg_task_groups
    WHERE id >= $2
      AND ended_at < $1
    ORDER BY id
    LIMIT 1
    FOR UPDATE SKIP LOCKED
),
results AS (
    DELETE FROM pg_task_group_results
    WHERE (group_id, task_id) IN (
        SELECT group_id, task_id
        FROM pg_task_group_results
        WHERE group_id = (SELECT id FROM old)
        ORDER BY task_id
        LIMIT $3
    )
    RETURNING group_id
),
is_last AS MATERIALIZED (
    SELECT count(*) < $3 AS yes
    FROM results
),
counts AS (
    DELETE FROM pg_task_group_counts
    WHERE group_id = (SELECT id FROM old WHERE (SELECT yes FROM is_last))
),
removed AS (
    DELETE FROM pg_task_groups
    WHERE id = (SELECT id FROM old WHERE (SELECT yes FROM is_last))
    RETURNING id
)
SELECT (SELECT count(*) FROM removed), CASE WHEN (SELECT yes FROM is_last) THEN id + 1 ELSE id END
FROM old
