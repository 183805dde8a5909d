-- Release what a claim took under the token $1 whose reply was lost with the connection; no worker knows of these
-- leases. Notifies the workers of their queues. Returns how many it has released, and how many are left, since another
-- session has locked their rows.
WITH taken AS MATERIALIZED (
    SELECT id
    FROM pg_task
    WHERE locked_by = $1
      AND lock_expires_at > now()
),
free AS MATERIALIZED (
    SELECT id
    FROM pg_task
    WHERE id = ANY (ARRAY (SELECT id FROM taken))
      AND locked_by IS NOT DISTINCT FROM $1
    FOR NO KEY UPDATE SKIP LOCKED
),
released AS (
    UPDATE pg_task
    SET locked_by = NULL,
        lock_expires_at = NULL,
        claims = claims - 1
    WHERE id = ANY (ARRAY (SELECT id FROM free))
    RETURNING
        id,
        -- include: shared/told.sql
)
SELECT count(*), (SELECT count(*) FROM taken) - count(*)
FROM released
