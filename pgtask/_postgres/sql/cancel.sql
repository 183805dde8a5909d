-- Remove the tasks $1, those under a live lease only if $2. The outcome of a worker that holds the lease of a removed
-- task no longer matches a row and is dropped. Returns the columns of retry.sql.
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
      AND ($2 OR locked_by IS NULL OR lock_expires_at < now())
    ORDER BY id
    FOR UPDATE
),
changed AS (
    DELETE FROM pg_task
    WHERE id = ANY (ARRAY (SELECT id FROM free))
    RETURNING id
)
-- include: shared/changed.sql
