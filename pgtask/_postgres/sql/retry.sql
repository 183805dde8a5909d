-- Make the tasks $1 due, without an error and with all their retries; a task under a live lease, or behind
-- another one, is left alone.
--
-- Returns for each whether it was done, whether the task existed, and the end of its lease. Locks in the order of
-- ids, so that two such statements do not deadlock.
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
      AND (locked_by IS NULL OR lock_expires_at < now())
      AND behind IS NULL
    ORDER BY id
    FOR NO KEY UPDATE
),
changed AS (
    -- include: shared/made_due.sql
)
-- include: shared/changed_and_told.sql
