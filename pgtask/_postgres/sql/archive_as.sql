-- Finish tasks and keep their rows in the archive: ids $1, lease tokens $2, and the step $3 that the archive gets (null:
-- that of the row). Fenced as in flush.sql, and returns its columns.
--
-- A statement of its own, so that other tasks that are archived send no steps. Plan: that of archive.sql; its rows are
-- joined with the steps by a hash of the ids.
WITH done AS (
    DELETE FROM pg_task
    -- include: shared/our_leases.sql
    RETURNING id, step, queue, priority, key, tried, created_at
),
archived AS (
    INSERT INTO pg_task_archive (id, step, queue, priority, key, tried, created_at, outcome)
    SELECT done.id, coalesce(kept.step, done.step), queue, priority, key, tried, created_at, 'done'
    FROM done
    JOIN unnest($1::uuid[], $3::text[]) AS kept (id, step) ON kept.id = done.id
)
SELECT
    CASE WHEN (SELECT count(*) FROM done) < cardinality($1::uuid[]) THEN ARRAY (SELECT id FROM done) END,
    NULL,
    NULL,
    NULL
