-- Remove up to $2 actions that began before $1, the oldest first, from the number $3 on. Returns how many were removed, and
-- the number after the last one.
--
-- Plan: the primary key, up to the first action that is younger.
WITH old AS MATERIALIZED (
    SELECT id, began_at
    FROM pg_task_actions
    WHERE id >= $3
    ORDER BY id
    LIMIT $2
    FOR UPDATE SKIP LOCKED
),
removed AS (
    DELETE FROM pg_task_actions
    WHERE id = ANY (ARRAY (SELECT id FROM old WHERE began_at < $1))
    RETURNING id
)
SELECT (SELECT count(*) FROM removed), max(id) + 1, count(*) = $2 AND (SELECT count(*) FROM removed) > 0
FROM old
