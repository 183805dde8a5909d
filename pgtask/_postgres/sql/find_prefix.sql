-- The first $3 tasks whose ids lie between $1 and $2: those that begin with the same digits.
SELECT id
FROM pg_task
WHERE id BETWEEN $1 AND $2
ORDER BY id
LIMIT $3
