-- Finish tasks and keep their rows in the archive: ids $1, lease tokens $2. Fenced as in flush.sql, and returns its
-- columns.
--
-- A statement of its own, so that a worker whose tasks are not archived never touches the table, and needs no right to it.
WITH done AS (
    DELETE FROM pg_task
    -- include: shared/our_leases.sql
    RETURNING id, step, queue, priority, key, tried, created_at
),
archived AS (
    INSERT INTO pg_task_archive (id, step, queue, priority, key, tried, created_at, outcome)
    SELECT id, step, queue, priority, key, tried, created_at, 'done'
    FROM done
)
SELECT
    CASE WHEN (SELECT count(*) FROM done) < cardinality($1::uuid[]) THEN ARRAY (SELECT id FROM done) END,
    NULL,
    NULL,
    NULL
