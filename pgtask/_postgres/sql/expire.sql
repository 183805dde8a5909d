-- Make tasks ready again whose lease has run out, at most $1 of them, and say in how many seconds the next one ends.
--
-- The holder is fenced from here on: its token no longer matches. `claims` stays, so that the crash is counted. After
-- the first the task has waited long enough, for its lease; after the next it waits another 5 s, as in handover.sql.
WITH expired AS (
    UPDATE pg_task
    SET locked_by = NULL,
        lock_expires_at = NULL,
        wakeup_at = CASE WHEN claims < 2 THEN wakeup_at ELSE now() + interval '5 s' END
    WHERE id = ANY (ARRAY (
        SELECT id
        FROM pg_task
        WHERE locked_by IS NOT NULL
          AND lock_expires_at < now()
        ORDER BY lock_expires_at
        LIMIT $1
        FOR NO KEY UPDATE SKIP LOCKED
    ))
    RETURNING id
)
SELECT
    (SELECT count(*) FROM expired),
    (
        SELECT (extract(epoch FROM lock_expires_at) - extract(epoch FROM now()))::float8
        FROM pg_task
        WHERE locked_by IS NOT NULL
          AND lock_expires_at >= now()
        ORDER BY lock_expires_at
        LIMIT 1
    )
