-- The next step of each task that goes on under its lease: ids $3, tokens $4, steps $5, position $6. flush.sql describes
-- the fence, and why each row is joined by an array of one id.
    UPDATE pg_task AS task
    SET step = outcome.step,
        tried = 0,
        claims = 1,
        position = $6,
        progress = NULL,
        expires_at = NULL,
        updated_at = now()
    FROM unnest($3::uuid[], $4::uuid[], $5::text[]) AS outcome (id, token, step)
    WHERE task.id = ANY (ARRAY[outcome.id])
      AND task.locked_by IS NOT DISTINCT FROM outcome.token
      AND task.position <= $6::bigint
