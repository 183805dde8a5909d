-- Finish tasks and keep their rows in the archive: ids $1, lease tokens $2, and the step $3 that the archive gets (null:
-- that of the row). Fenced as in flush.sql, and returns its columns.
--
-- A statement of its own, so that other tasks that are archived send no steps. Plan: that of archive.sql. The steps are an
-- object by id, for a join would compare each row with each step if the planner expects few.
WITH kept AS MATERIALIZED (
    SELECT jsonb_object($1::uuid[]::text[], $3::text[]) AS steps
),
done AS (
    DELETE FROM pg_task
    -- include: shared/our_leases.sql
    RETURNING id, step, queue, priority, key, tried, created_at
),
archived AS (
    INSERT INTO pg_task_archive (id, step, queue, priority, key, tried, created_at, outcome)
    SELECT done.id, coalesce(kept.steps ->> done.id::text, done.step), queue, priority, key, tried, created_at, 'done'
    FROM done
    CROSS JOIN kept
)
SELECT
    CASE WHEN (SELECT count(*) FROM done) < cardinality($1::uuid[]) THEN ARRAY (SELECT id FROM done) END,
    NULL,
    NULL,
    NULL
