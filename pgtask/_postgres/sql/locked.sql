-- Which of the tasks $1 somebody else has locked just now, without waiting for them.
WITH free AS MATERIALIZED (
    SELECT id
    FROM pg_task
    WHERE id = ANY ($1::uuid[])
    FOR UPDATE SKIP LOCKED
)
SELECT id
FROM pg_task
WHERE id = ANY ($1::uuid[])
  AND id <> ALL (ARRAY (SELECT id FROM free))
