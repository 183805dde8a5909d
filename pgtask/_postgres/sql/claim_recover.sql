-- Give back what a claim took under token $1 when its reply was lost with the connection: nobody here knows of it.
UPDATE pg_task
SET locked_by = NULL,
    lock_expires_at = NULL,
    claims = claims - 1
WHERE id = ANY (ARRAY (
    SELECT id
    FROM pg_task
    WHERE locked_by = $1
      AND lock_expires_at > now()
    FOR NO KEY UPDATE
))
RETURNING id
