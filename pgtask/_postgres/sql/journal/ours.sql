-- Find those of the leases (runs $1, tokens $2) that this worker still holds: a statement that skipped one of these found
-- a row of the run locked.
SELECT task.id
FROM unnest($1::uuid[], $2::uuid[]) AS lease (id, token)
CROSS JOIN LATERAL (
    SELECT id
    FROM pg_task
    WHERE id = lease.id
      AND locked_by IS NOT DISTINCT FROM lease.token
    OFFSET 0
) AS task
