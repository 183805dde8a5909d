-- Lease the tasks $1 under the token $2 for $3 seconds, whose step executes though the transaction that held their rows is
-- over, unless another worker has them by now. $4 is the key of their limit, which counts them from now on, or null. Plan: by the
-- primary key, since the conditions match no partial index.
UPDATE pg_task
SET locked_by = $2,
    lock_expires_at = clock_timestamp() + make_interval(secs => $3),
    claims = 1,
    position = 0,
    limit_key = coalesce($4::text, limit_key),
    limit_at = CASE WHEN $4 IS NULL THEN limit_at ELSE wakeup_at END,
    wakeup_at = CASE WHEN $4 IS NULL THEN wakeup_at ELSE 'infinity' END
WHERE id = ANY (ARRAY (
    SELECT id
    FROM pg_task
    WHERE id = ANY ($1::uuid[])
      AND coalesce(locked_by::text, error) IS NULL
      AND claims = 0
    FOR NO KEY UPDATE SKIP LOCKED
))
RETURNING id
