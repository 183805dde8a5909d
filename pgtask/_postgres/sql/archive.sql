-- Finish tasks that are to be kept: ids $1, lease tokens $2. Fenced as in flush.sql, whose columns come back.
--
-- A statement of its own, so that a worker whose tasks are not archived never touches the table, and needs no right to.
WITH done AS (
    DELETE FROM pg_task AS task
    USING unnest($1::uuid[], $2::uuid[]) AS outcome (id, token)
    WHERE task.id = outcome.id
      AND task.locked_by = outcome.token
    RETURNING task.id, task.step, task.queue, task.priority, task.key, task.tried, task.created_at
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
