-- Describe the tasks $1 of the token $2 for a consumer, beyond the columns of the claim. Plan: as in renew_locked.sql.
SELECT
    id, queue, priority, key, created_at
    -- traced: , trace
FROM pg_task
WHERE id = ANY ($1::uuid[])
  AND locked_by IS NOT DISTINCT FROM $2
