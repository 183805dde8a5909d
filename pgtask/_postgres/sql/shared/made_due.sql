-- Make the tasks of the CTE `free` due, without an error, a lease or a count of tries, and return their ids.
    UPDATE pg_task
    SET error = NULL,
        tried = 0,
        claims = 0,
        expires_at = NULL,
        wakeup_at = least(wakeup_at, now()),
        locked_by = NULL,
        lock_expires_at = NULL,
        updated_at = now()
    WHERE id = ANY (ARRAY (SELECT id FROM free))
    RETURNING id
