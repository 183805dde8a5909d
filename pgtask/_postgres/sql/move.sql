-- Move the tasks $1 to the queue $2 with the priority $3 (null: as it is). A task under a live lease is left alone, since
-- its worker writes where it goes next. Returns the columns of retry.sql.
--
-- Plan: OFFSET 0 has the planner look up each of these rows by itself, by the primary key, with any statistics.
WITH requested AS (
    SELECT DISTINCT id
    FROM unnest($1::uuid[]) AS requested (id)
),
free AS MATERIALIZED (
    SELECT id
    FROM pg_task
    WHERE id = ANY ($1::uuid[])
-- include: shared/unleased.sql
    ORDER BY id
    FOR NO KEY UPDATE
),
changed AS (
    UPDATE pg_task
    SET queue = coalesce($2::text, queue),
        priority = coalesce($3::smallint, priority)
    WHERE id = ANY (ARRAY (SELECT id FROM free))
    RETURNING id
)
-- include: shared/changed.sql
