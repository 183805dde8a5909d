-- Move those of the tasks $1 that the filter $2 to $7 still chooses to the queue $8 with the priority $9, as move.sql
-- does; returns the number. Passes over what is there already, what a worker holds, and rows that another session has
-- locked. Runs after together.sql.
WITH free AS MATERIALIZED (
    SELECT id
    FROM pg_task
    WHERE id = ANY ($1::uuid[])
-- include: shared/matching.sql
-- include: shared/movable.sql
    ORDER BY id
    FOR NO KEY UPDATE SKIP LOCKED
),
changed AS (
    UPDATE pg_task
    SET queue = coalesce($8::text, queue),
        priority = coalesce($9::smallint, priority),
        updated_at = now()
    WHERE id = ANY (ARRAY (SELECT id FROM free))
    RETURNING id
)
-- include: shared/all_told.sql
