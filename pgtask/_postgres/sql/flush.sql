-- Write the outcomes of a batch, each fenced by its task's id and lease token.
--
--   done         $1 ids, $2 tokens: the task is finished, its row is deleted
--   continued    $3 ids, $4 tokens, $5 steps: the task goes on under its lease (a HOT update: no indexed column changes).
--                $6 is the number of this flush, greater than those of all flushes of this worker before
--   rescheduled  $7 ids, $8 tokens, $9 steps (null: the same), $10 tried (null: the same), $11 errors, $12 delays in
--                seconds (null: wakeup_at stays), $13 queues and $14 priorities (null: the same), $15 claims (null: 0):
--                the task leaves this worker
--   $16          tell idle workers: another fleet may serve the new queue of a rescheduled task
--
-- The fence is the token, not the end of the lease: an outcome that is late still counts while no other worker has
-- claimed the task. All steps under one lease have one token, so a task that continues has a position as well: a
-- statement that was sent twice, and arrives behind a later one, finds a greater position and changes nothing.
--
-- A row whose lease was lost does not match and stays as it is; the ids of a kind come back only when some of its
-- leases were lost.
--
-- Plan: each row by the primary key, as our_leases.sql says. An update takes its values from a row of its batch, so it
-- joins them, but by an array of one id: only an equality lets the planner merge, or read all of an index in the order
-- of the ids. IS NOT DISTINCT FROM keeps it off the index of leases.
WITH done AS (
    DELETE FROM pg_task
    -- include: shared/our_leases.sql
    RETURNING id
),
continued AS (
    -- include: shared/goes_on.sql
    RETURNING task.id
),
rescheduled AS (
    -- include: shared/leaves.sql
    RETURNING task.id
)
-- include: shared/lost.sql
