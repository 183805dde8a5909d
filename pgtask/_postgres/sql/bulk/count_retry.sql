-- Count those of the tasks $1 that the filter $2 to $7 chooses and a retry in bulk would change.
SELECT count(*)
FROM pg_task
WHERE id = ANY ($1::uuid[])
-- include: shared/matching.sql
-- include: shared/retriable.sql
