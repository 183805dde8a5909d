-- Write the outcomes of a batch, each fenced by its task's id and lease token.
--
--   done   $1 ids, $2 tokens: the task is finished, its row goes
--   kept   $3 ids, $4 tokens, $5 steps: it goes on now under its lease (a HOT update: no indexed column changes)
--   moved  $6 ids, $7 tokens, $8 steps (null: the same), $9 tried (null: the same), $10 errors, $11 delays in seconds
--          (null: wakeup_at stays), $12 queues and $13 priorities (null: the same), $14 claims (null: 0): it leaves
--          the worker's hands
--   $15    tell idle workers: a moved task may concern a fleet that serves another queue
--
-- Not fenced by the end of the lease: finished work that nobody has taken over still counts. Rows whose lease was lost
-- do not match and are left alone; the ids of a kind come back only when some of it were lost.
WITH done AS (
    DELETE FROM pg_task AS task
    USING unnest($1::uuid[], $2::uuid[]) AS outcome (id, token)
    WHERE task.id = outcome.id
      AND task.locked_by = outcome.token
    RETURNING task.id
),
kept AS (
    UPDATE pg_task AS task
    SET step = outcome.step,
        tried = 0,
        claims = 1,
        updated_at = now()
    FROM unnest($3::uuid[], $4::uuid[], $5::text[]) AS outcome (id, token, step)
    WHERE task.id = outcome.id
      AND task.locked_by = outcome.token
    RETURNING task.id
),
moved AS (
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
        updated_at = now()
    FROM unnest($6::uuid[], $7::uuid[], $8::text[], $9::integer[], $10::text[], $11::float8[], $12::text[], $13::smallint[],
        $14::integer[])
        AS outcome (id, token, step, tried, error, delay, queue, priority, claims)
    WHERE task.id = outcome.id
      AND task.locked_by = outcome.token
    RETURNING task.id
)
SELECT
    CASE WHEN (SELECT count(*) FROM done) < cardinality($1::uuid[]) THEN ARRAY (SELECT id FROM done) END,
    CASE WHEN (SELECT count(*) FROM kept) < cardinality($3::uuid[]) THEN ARRAY (SELECT id FROM kept) END,
    CASE WHEN (SELECT count(*) FROM moved) < cardinality($6::uuid[]) THEN ARRAY (SELECT id FROM moved) END,
    CASE WHEN $15 THEN pg_notify('pg_task_changed', '')::text END
