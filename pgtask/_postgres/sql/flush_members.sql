-- Write the outcomes of a batch with members of groups: what flush_enqueue.sql does, and count for the groups. $1 to $25 are
-- as there, and so are the fence and the answer, which ends with the groups that have changed. Archived: as archive_as.sql does; $28 the step that the archive gets (null: that of the row).
--
-- A statement of its own, so that others pay nothing for groups. Locks the rows of tasks before those of counts.
WITH done AS (
    DELETE FROM pg_task
    -- include: shared/our_leases.sql
    RETURNING id, group_id
    -- archived: , step, queue, priority, key, tried, created_at
),
-- archived: archived AS (
-- archived:     INSERT INTO pg_task_archive (id, step, queue, priority, key, tried, created_at, outcome)
-- archived:     SELECT done.id, coalesce(steps ->> done.id::text, done.step), queue, priority, key, tried, created_at, 'done'
-- archived:     FROM done
-- archived:     CROSS JOIN (SELECT jsonb_object($1::uuid[]::text[], $28::text[]) AS steps) AS step_kept
-- archived: ),
-- include: shared/new_tasks.sql
