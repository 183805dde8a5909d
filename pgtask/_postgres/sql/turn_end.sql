-- Write the outcomes of a batch whose rows this transaction has locked by turn_lock.sql.
--
--   done         $1 ids: the task is finished, its row is deleted
--   leased       $2 ids, $3 steps (null: the same): the task goes on, under a lease with the token $4 for $5 seconds
--   rescheduled  $6 ids, and the columns of flush.sql: $7 steps, $8 tried, $9 errors, $10 delays, $11 queues, $12
--                priorities, $13 claims
--   $14          tell idle workers: another fleet may serve the new queue of a rescheduled task
--
-- Grouped, for a batch with members of groups: $16 ids and $17 their results, as JSON; it counts for the groups, and
-- returns those that have changed as well.
--
-- Returns how many rows of each kind it has written. The lock is the fence, so it counts in that transaction only, which
-- has the setting $15. Plan: by arrays of one id, as flush.sql says.
WITH done AS (
    DELETE FROM pg_task
    WHERE id = ANY ($1::uuid[])
      AND current_setting('pgtask.held', true) = $15
    RETURNING id
    -- grouped: , group_id
),
leased AS (
    UPDATE pg_task AS task
    SET step = coalesce(outcome.step, task.step),
        tried = CASE WHEN outcome.step IS NULL THEN task.tried ELSE 0 END,
        locked_by = $4,
        lock_expires_at = clock_timestamp() + make_interval(secs => $5),
        claims = 1,
        position = 0,
        expires_at = CASE WHEN outcome.step IS NULL THEN task.expires_at END,
        updated_at = CASE WHEN outcome.step IS NULL THEN task.updated_at ELSE clock_timestamp() END
    FROM unnest($2::uuid[], $3::text[]) AS outcome (id, step)
    WHERE task.id = ANY (ARRAY[outcome.id])
      AND current_setting('pgtask.held', true) = $15
    RETURNING task.id
),
rescheduled AS (
    UPDATE pg_task AS task
    SET step = coalesce(outcome.step, task.step),
        tried = coalesce(outcome.tried, task.tried),
        error = outcome.error,
        wakeup_at = coalesce(clock_timestamp() + make_interval(secs => outcome.delay), task.wakeup_at),
        queue = coalesce(outcome.queue, task.queue),
        priority = coalesce(outcome.priority, task.priority),
        claims = coalesce(outcome.claims, 0),
        expires_at = CASE WHEN coalesce(outcome.step, outcome.tried::text) IS NULL THEN task.expires_at END,
        updated_at = clock_timestamp()
    FROM unnest($6::uuid[], $7::text[], $8::integer[], $9::text[], $10::float8[], $11::text[], $12::smallint[],
        $13::integer[])
        AS outcome (id, step, tried, error, delay, queue, priority, claims)
    WHERE task.id = ANY (ARRAY[outcome.id])
      AND current_setting('pgtask.held', true) = $15
    RETURNING task.id
    -- grouped: , task.group_id, task.error
)
-- grouped: ,
-- grouped: kept AS MATERIALIZED (
-- grouped:     SELECT jsonb_object($16::uuid[]::text[], $17::text[]) AS results
-- grouped:     WHERE cardinality($16::uuid[]) > 0
-- grouped: ),
-- grouped: -- include: shared/results.sql
-- grouped: moved AS (
-- grouped:     SELECT group_id, 1 AS done, 0 AS added, 0 AS parked
-- grouped:     FROM done
-- grouped:     UNION ALL
-- grouped:     SELECT group_id, 0, 0, 1
-- grouped:     FROM rescheduled
-- grouped:     WHERE error IS NOT NULL
-- grouped: ),
-- grouped: -- include: shared/counted.sql
SELECT
    (SELECT count(*) FROM done),
    (SELECT count(*) FROM leased),
    (SELECT count(*) FROM rescheduled),
    CASE WHEN $14 THEN pg_notify('pg_task_changed', '')::text END
    -- grouped: , ARRAY (SELECT group_id FROM counted)
