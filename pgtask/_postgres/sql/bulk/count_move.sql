-- Count those of the tasks $1 that the filter $2 to $7 chooses and a move in bulk would change to the queue $8 with the priority $9.
SELECT count(*)
FROM pg_task
WHERE id = ANY ($1::uuid[])
-- include: shared/matching.sql
-- include: shared/movable.sql
