-- The first $2 tasks whose ids end with $1. Compares all ids, in an index, which is a fraction of the table.
SELECT id
FROM pg_task
WHERE id::text LIKE '%' || $1
ORDER BY id
LIMIT $2
