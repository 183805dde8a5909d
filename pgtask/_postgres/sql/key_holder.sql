-- Return the step of the task $1, and whether this transaction has inserted it.
SELECT
    step,
    created_at = now() AS is_new
FROM pg_task
WHERE id = $1
