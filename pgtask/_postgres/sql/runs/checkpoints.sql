-- Read the checkpoints of the run $1 in their order; of results and errors the first $2 characters (null: all).
SELECT
    number,
    place,
    kind,
    name,
    coalesce(left(result, $2), result) AS result,
    coalesce(left(error, $2), error) AS error,
    due_at,
    tried,
    seconds,
    recorded_at
FROM pg_task_checkpoints
WHERE run = $1
ORDER BY number
