-- Find the tasks with one of the keys $1 that the filter $2 to $7 chooses, the first thousand: shared/matching.sql.
SELECT id
FROM pg_task
WHERE key = ANY ($1::text[])
-- include: shared/matching.sql
ORDER BY id
LIMIT 1000
