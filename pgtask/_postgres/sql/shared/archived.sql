-- Keep the rows of the CTE `done` in the archive.
archived AS (
    INSERT INTO pg_task_archive (id, step, queue, priority, key, tried, created_at, outcome)
    SELECT id, step, queue, priority, key, tried, created_at, 'done'
    FROM done
),
