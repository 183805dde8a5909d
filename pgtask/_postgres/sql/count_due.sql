-- How many tasks of the queues $1 (null: all) are leased or due within $2 seconds; counts no further than $3.
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
