-- Count the leases of each worker, by the first half of their tokens, and find the $2 tasks that have been leased for
-- longest. Reads $1 leases at most, those that expire first.
--
-- Rows with a `worker` and `tasks` are counts; the others have the task, and since when: its claim, of which the second
-- half of a token has the time, or its last outcome under that lease. Tokens of the Rust crate hold no time.
--
-- Plan: the left end of pg_task_lease_idx, then the primary key for the few tasks that are shown.
WITH leased AS MATERIALIZED (
    SELECT
        id,
        replace(locked_by::text, '-', '') AS token,
        extract(epoch FROM created_at)::float8 AS created,
        extract(epoch FROM updated_at)::float8 AS updated
    FROM pg_task
    WHERE locked_by IS NOT NULL
      AND error IS NULL
    ORDER BY lock_expires_at
    LIMIT $1
),
timed AS (
    SELECT
        id,
        token,
        greatest(updated, CASE
            WHEN claimed BETWEEN created - 60 AND extract(epoch FROM statement_timestamp())::float8 + 60 THEN claimed
        END) AS since
    FROM leased
    CROSS JOIN LATERAL (SELECT ('x' || right(token, 16))::bit(64)::bigint / 1e6::float8 AS claimed) AS second_half
),
longest AS (
    SELECT id, left(token, 16) AS worker, since
    FROM timed
    ORDER BY since
    LIMIT $2
)
SELECT left(token, 16) AS worker, count(*) AS tasks, NULL::uuid AS id, NULL AS queue, NULL AS step, NULL AS seconds
FROM leased
GROUP BY left(token, 16)
UNION ALL
SELECT
    longest.worker,
    NULL,
    task.id,
    task.queue,
    left(task.step, 1024),
    greatest(0, extract(epoch FROM statement_timestamp())::float8 - longest.since)
FROM longest
JOIN pg_task AS task ON task.id = longest.id
