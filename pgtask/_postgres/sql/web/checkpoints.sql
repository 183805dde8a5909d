-- Read the last $3 checkpoints of the run $1, the last one first; of results and errors the first $2 characters.
--
-- Plan: the primary key backwards. Locks nothing.
SELECT
    number,
    place,
    kind,
    name,
    left(result, $2) AS result,
    left(error, $2) AS error,
    due_at,
    tried,
    seconds,
    recorded_at
FROM pg_task_checkpoints
WHERE run = $1
ORDER BY number DESC
LIMIT $3
