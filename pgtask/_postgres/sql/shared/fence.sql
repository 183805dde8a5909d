    -- The fence: an entry counts under its lease only, and the row of the task stays locked to the end of the statement. A
    -- row that another session has locked is skipped, and the journal tries its entry again. Plan: a look-up by the
    -- primary key for each entry, since the condition on the token matches no partial index.
    CROSS JOIN LATERAL (
        SELECT wakeup_at, claims
        FROM pg_task
        WHERE id = entry.run
          AND locked_by IS NOT DISTINCT FROM entry.token
        FOR NO KEY UPDATE SKIP LOCKED
    ) AS task
