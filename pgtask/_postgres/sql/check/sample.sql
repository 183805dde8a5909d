-- Read as check/rows.sql does, but only $3 tasks, chosen at random.
--
-- Plan: a scan of the table, which keeps the places of $3 rows; then these by their places.
SELECT
    id,
    CASE WHEN octet_length(step) <= $1 THEN step END,
    left(error, 1000)
FROM pg_task
WHERE ctid = ANY (ARRAY (
    SELECT ctid
    FROM pg_task
    WHERE $2::text[] IS NULL
       OR queue = ANY ($2::text[])
    ORDER BY random()
    LIMIT $3
))
