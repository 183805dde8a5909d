-- Count the tasks of the queues $1 (null: all) that are leased or due within $2 seconds, no further than $3.
SELECT count(*)
FROM (
    SELECT
    FROM pg_task
    WHERE locked_by IS NULL
      AND error IS NULL
      AND wakeup_at <= now() + make_interval(secs => $2)
      AND ($1::text[] IS NULL OR queue = ANY ($1))
    UNION ALL
    SELECT
    FROM pg_task
    WHERE locked_by IS NOT NULL
      AND ($1::text[] IS NULL OR queue = ANY ($1))
    LIMIT $3
) AS due
