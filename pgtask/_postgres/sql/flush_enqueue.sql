-- Write the outcomes of a batch that enqueue new tasks, and insert these. $1 to $16 are as in flush.sql, and so are the
-- fence and the answer; shared/new_tasks.sql describes $17 to $24.
--
-- A statement of its own, so that outcomes that enqueue nothing never wait for the key of a new task.
WITH done AS (
    DELETE FROM pg_task
    -- include: shared/our_leases.sql
    RETURNING id
),
-- include: shared/new_tasks.sql
