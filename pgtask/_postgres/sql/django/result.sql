-- The task $1: its row or, once it is finished, its latest record in the archive. One statement reads both, since two
-- could miss a task that finishes between them. `is_running`: a worker has its lease, and no error has parked it.
--
-- Django's own connection sends it. Plan: a look at each primary key. It locks nothing.
SELECT
    step,
    queue,
    priority,
    created_at,
    updated_at AS changed_at,
    locked_by::text AS lease,
    error IS NULL AND locked_by IS NOT NULL AND lock_expires_at >= now() AS is_running,
    error,
    false AS is_archived
FROM pg_task
WHERE id = $1::uuid
UNION ALL
(
    SELECT step, queue, priority, created_at, finished_at, NULL, false, NULL, true
    FROM pg_task_archive
    WHERE id = $1::uuid
    ORDER BY finished_at DESC
    LIMIT 1
)
