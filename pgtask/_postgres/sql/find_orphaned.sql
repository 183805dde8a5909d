-- Find the tasks that a dead worker holds: those with tokens from $1 to $2. For release_orphaned.sql, where that is too slow
-- for all of them at once. Plan: as there.
SELECT id
FROM pg_task
WHERE locked_by IS NOT NULL
  AND lock_expires_at > '-infinity'
  AND locked_by BETWEEN $1 AND $2
