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
    UPDATE pg_task AS task
    SET step = outcome.step,
        tried = 0,
        claims = 1,
        position = $6,
        progress = NULL,
        updated_at = now()
    FROM unnest($3::uuid[], $4::uuid[], $5::text[]) AS outcome (id, token, step)
    WHERE task.id = ANY (ARRAY[outcome.id])
      AND task.locked_by IS NOT DISTINCT FROM outcome.token
      AND task.position <= $6::bigint
    RETURNING task.id
),
rescheduled AS (
    UPDATE pg_task AS task
    SET step = coalesce(outcome.step, task.step),
        tried = coalesce(outcome.tried, task.tried),
        error = outcome.error,
        wakeup_at = coalesce(now() + make_interval(secs => outcome.delay), task.wakeup_at),
        queue = coalesce(outcome.queue, task.queue),
        priority = coalesce(outcome.priority, task.priority),
        locked_by = NULL,
        lock_expires_at = NULL,
        claims = coalesce(outcome.claims, 0),
        progress = NULL,
        updated_at = now()
    FROM unnest($7::uuid[], $8::uuid[], $9::text[], $10::integer[], $11::text[], $12::float8[], $13::text[],
        $14::smallint[], $15::integer[])
        AS outcome (id, token, step, tried, error, delay, queue, priority, claims)
    WHERE task.id = ANY (ARRAY[outcome.id])
      AND task.locked_by IS NOT DISTINCT FROM outcome.token
    RETURNING task.id
)
SELECT
    CASE WHEN (SELECT count(*) FROM done) < cardinality($1::uuid[]) THEN ARRAY (SELECT id FROM done) END,
    CASE WHEN (SELECT count(*) FROM continued) < cardinality($3::uuid[]) THEN ARRAY (SELECT id FROM continued) END,
    CASE WHEN (SELECT count(*) FROM rescheduled) < cardinality($7::uuid[]) THEN ARRAY (SELECT id FROM rescheduled) END,
    CASE WHEN $16 THEN pg_notify('pg_task_changed', '')::text END
