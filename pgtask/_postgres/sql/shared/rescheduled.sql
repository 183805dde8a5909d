-- Make the tasks of the CTE `free` due at the time of the CTE `target`. One that was parked begins its tries again.
    UPDATE pg_task
    SET wakeup_at = (SELECT at FROM target),
        tried = CASE WHEN error IS NULL THEN tried ELSE 0 END,
        claims = CASE WHEN error IS NULL AND locked_by IS NULL THEN claims ELSE 0 END,
        expires_at = CASE WHEN error IS NULL THEN expires_at END,
        error = NULL,
        locked_by = NULL,
        lock_expires_at = NULL,
        updated_at = now()
    WHERE id = ANY (ARRAY (SELECT id FROM free))
    RETURNING id
