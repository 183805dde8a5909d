-- Parked tasks that last changed after the place $1, $2 (time and id), at most $3, in the order of their changes. Reads
-- all parked tasks.
SELECT id, step, error, tried, queue, priority, key, created_at, updated_at AS parked_at
FROM pg_task
WHERE error IS NOT NULL
  AND (updated_at, id) > ($1, $2)
ORDER BY updated_at, id
LIMIT $3
