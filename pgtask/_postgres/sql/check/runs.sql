-- Read the tasks $1 of runs, those that still wait: the step, the count of failed tries, and the beginning of the
-- error.
--
-- Plan: by the primary key.
SELECT
    id,
    step,
    tried,
    left(error, 1000) AS error
FROM pg_task
WHERE id = ANY ($1::uuid[])
ORDER BY id
