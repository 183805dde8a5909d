-- Read all that waits, for a COPY: the id, the step and the beginning of the error of each task of the queues $2 (null:
-- of all). A step of more than $1 bytes is not sent.
--
-- Plan: one scan of the table, in the order in which it lies.
SELECT
    id,
    CASE WHEN octet_length(step) <= $1 THEN step END,
    left(error, 1000)
FROM pg_task
WHERE $2::text[] IS NULL
   OR queue = ANY ($2::text[])
