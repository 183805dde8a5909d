-- Count the tasks of the queues $1 (null: all) that a burst has left parked, by the name of the task in the envelope,
-- still escaped (null: the row has no envelope). Counts up to $2 rows.
SELECT
    substring(left(step, 1000) FROM '^\s*\{\s*"((?:[^"\\]|\\.)*)"\s*:'),
    count(*)
FROM (
    SELECT step
    FROM pg_task
    WHERE error IS NOT NULL
      AND ($1::text[] IS NULL OR queue = ANY ($1))
    LIMIT $2
) AS parked
GROUP BY 1
