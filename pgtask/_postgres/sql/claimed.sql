-- What a consumer is told of the tasks $1 beside what their claim under the token $2 has said.
SELECT id, queue, priority, key, created_at
FROM pg_task
WHERE id = ANY ($1::uuid[])
  AND locked_by = $2
