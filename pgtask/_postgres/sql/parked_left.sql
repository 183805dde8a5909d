-- How many tasks of the queues $1 (null: all) a burst has left parked; no further than $2.
SELECT count(*)
FROM (
    SELECT FROM pg_task
    WHERE error IS NOT NULL
      AND ($1::text[] IS NULL OR queue = ANY ($1))
    LIMIT $2
) AS parked
