-- Count those of the tasks $1 that the filter $2 to $7 chooses and a cancel in bulk would change; those under a live lease only if $8.
SELECT count(*)
FROM pg_task
WHERE id = ANY ($1::uuid[])
-- include: shared/matching.sql
-- include: shared/cancellable.sql
