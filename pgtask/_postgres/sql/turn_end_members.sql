-- Write the outcomes of a batch with members of groups whose rows this transaction has locked by turn_lock.sql: what
-- turn_end.sql does, with its parameters, and count for the groups. $16 ids and $17 their results, as
-- JSON. Returns what turn_end.sql does, and the groups that have changed.
WITH done AS (
    DELETE FROM pg_task
    WHERE id = ANY ($1::uuid[])
      AND current_setting('pgtask.held', true) = $15
    RETURNING id, group_id
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
    RETURNING task.id, task.group_id, task.error
),
kept AS MATERIALIZED (
    SELECT jsonb_object($16::uuid[]::text[], $17::text[]) AS results
    WHERE cardinality($16::uuid[]) > 0
),
-- include: shared/results.sql
moved AS (
    SELECT group_id, 1 AS done, 0 AS added, 0 AS parked
    FROM done
    UNION ALL
    SELECT group_id, 0, 0, 1
    FROM rescheduled
    WHERE error IS NOT NULL
),
-- include: shared/counted.sql
SELECT
    (SELECT count(*) FROM done),
    (SELECT count(*) FROM leased),
    (SELECT count(*) FROM rescheduled),
    CASE WHEN $14 THEN pg_notify('pg_task_changed', '')::text END,
    ARRAY (SELECT group_id FROM counted)
