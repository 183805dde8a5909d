-- The outcome of each task that leaves this worker: the parameters $7 to $15, as flush.sql describes them.
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
        expires_at = CASE WHEN coalesce(outcome.step, outcome.tried::text) IS NULL THEN task.expires_at END,
        limit_key = CASE WHEN outcome.step IS NULL THEN task.limit_key END,
        updated_at = now()
    FROM unnest($7::uuid[], $8::uuid[], $9::text[], $10::integer[], $11::text[], $12::float8[], $13::text[],
        $14::smallint[], $15::integer[])
        AS outcome (id, token, step, tried, error, delay, queue, priority, claims)
    WHERE task.id = ANY (ARRAY[outcome.id])
      AND task.locked_by IS NOT DISTINCT FROM outcome.token
