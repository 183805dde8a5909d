-- Find the first waiting task of a lane (queue $1, priority $2) that belongs to no other app: its envelope (with its
-- key, shared/envelope.sql) does not match $5.
--
-- Reads up to $4 tasks in the order of their time, from $3 until $7 (seconds since the epoch), also those that fall due
-- later if $6. Returns the seconds until that task falls due, and that time; or, if there is none, how many it has read, and
-- the time of the last of them. Then the time now, and the seconds that it took.
WITH seen AS MATERIALIZED (
    SELECT
        wakeup_at,
        -- include: shared/envelope.sql
        !~ $5 AS known
    FROM pg_task
    WHERE queue = $1
      AND priority = $2
      AND wakeup_at >= to_timestamp($3)
      AND wakeup_at <= CASE WHEN $6 THEN 'infinity' ELSE now() END
      AND wakeup_at <= to_timestamp($7)
      AND locked_by IS NULL
      AND error IS NULL
    ORDER BY wakeup_at
    LIMIT $4
),
first AS MATERIALIZED (
    SELECT wakeup_at
    FROM seen
    WHERE known
    LIMIT 1
),
passed AS MATERIALIZED (
    SELECT count(*) AS tasks, max(wakeup_at) AS until
    FROM seen
    WHERE NOT EXISTS (SELECT FROM first)
)
SELECT
    (SELECT (extract(epoch FROM wakeup_at) - extract(epoch FROM now()))::float8 FROM first),
    (SELECT extract(epoch FROM wakeup_at)::float8 FROM first),
    tasks,
    extract(epoch FROM until)::float8,
    extract(epoch FROM now())::float8,
    date_part('epoch', clock_timestamp() - statement_timestamp()) + 0 * tasks
FROM passed
