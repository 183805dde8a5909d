-- Finish tasks, keep their rows in the archive, and insert the new tasks that their outcomes enqueue. The parameters are
-- those of flush_enqueue.sql: the finished tasks are $1 and $2, and there are no others.
WITH done AS (
    DELETE FROM pg_task
    -- include: shared/our_leases.sql
    RETURNING id, step, queue, priority, key, tried, created_at
),
-- include: shared/archived.sql
-- include: shared/new_tasks.sql
