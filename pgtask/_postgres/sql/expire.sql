-- Expire leases: make at most $1 of their tasks ready again. Returns how many, the seconds until the next lease ends, the
-- time (seconds since the epoch), and the seconds that it took.
--
-- It frees leases that ended from $2 on (seconds since the epoch), or from $3 seconds before now() if that is earlier,
-- and until $4 seconds before now(); and it searches for the next end from $5 on (seconds since the epoch). Entries of
-- finished tasks stay in the index while some transaction might see them, and it reads those between these bounds.
--
-- This fences the holder: its token matches no longer. `claims` stays, so that the loss is counted. The tasks of one
-- worker (the first half of the tokens) run again in two halves, as in release_orphaned.sql: each half has a
-- `wakeup_at` of its own. A task that is the only one of its half waits from its second loss on, 5 to 10 s, so that two
-- such tasks of one host do not meet again. The tasks of a consumer (its tokens begin with "hand") are not divided: the
-- user's code decides about them.
--
-- The next claim of a task that was lost alone with a third claim parks it. A task that was lost beside another with a
-- third claim, in any worker, was not alone: either of them may have ended the host. Then both counts go back to two,
-- also while the lease of the other is still valid. It looks for the other among the live leases, and among those that
-- ended between its bounds or within five minutes of them, freed or not: those of one host end together.
--
-- Locks the rows FOR NO KEY UPDATE and skips locked ones. Plan: reads only the leased rows, by the index of leases and
-- the primary key.
WITH expiring AS MATERIALIZED (
    SELECT id, claims, left(locked_by::text, 18) AS worker, locked_by::text LIKE '68616e64-%' AS of_consumer
    FROM pg_task
    WHERE locked_by IS NOT NULL
      AND lock_expires_at < now()
      AND lock_expires_at >= to_timestamp(least($2, extract(epoch FROM now())::float8 - $3))
      AND lock_expires_at <= to_timestamp(extract(epoch FROM now())::float8 - $4)
    ORDER BY lock_expires_at
    LIMIT $1
    FOR NO KEY UPDATE SKIP LOCKED
),
beside_expiring AS (
    SELECT id, claims, locked_by
    FROM pg_task
    WHERE locked_by IS NOT NULL
      AND lock_expires_at >= to_timestamp(least($2, extract(epoch FROM now())::float8 - $3)) - interval '5 min'
      AND lock_expires_at <= to_timestamp(extract(epoch FROM now())::float8 - $4) + interval '5 min'
      AND lock_expires_at < now()
    UNION ALL
    SELECT id, claims, locked_by
    FROM pg_task
    WHERE locked_by IS NOT NULL
      AND lock_expires_at >= now()
),
third_claims AS MATERIALIZED (
    SELECT id
    FROM beside_expiring
    WHERE claims >= 3
      AND locked_by::text NOT LIKE '68616e64-%'
      AND EXISTS (SELECT FROM expiring WHERE claims >= 3 AND NOT of_consumer)
),
not_alone AS (
    UPDATE pg_task
    SET claims = 2
    WHERE id = ANY (ARRAY (
        SELECT id
        FROM pg_task
        WHERE id = ANY (ARRAY (SELECT id FROM third_claims))
          AND id <> ALL (ARRAY (SELECT id FROM expiring))
          AND locked_by IS NOT NULL
        FOR NO KEY UPDATE SKIP LOCKED
    ))
),
workers AS (
    SELECT array_agg(id) AS ids, count(*) AS size, of_consumer, row_number() OVER () AS worker_number
    FROM expiring
    GROUP BY worker, of_consumer
),
divided AS MATERIALIZED (
    SELECT
        id,
        of_consumer,
        2 * worker_number + (number > (size + 1) / 2)::integer AS half,
        (size + (number <= (size + 1) / 2)::integer) / 2 AS size
    FROM workers
    CROSS JOIN unnest(ids) WITH ORDINALITY AS one (id, number)
),
expired AS (
    UPDATE pg_task AS task
    SET locked_by = NULL,
        lock_expires_at = NULL,
        claims = CASE
            WHEN claims >= 3 AND NOT of_consumer AND (SELECT count(*) FROM third_claims) > 1 THEN 2
            ELSE claims
        END,
        wakeup_at = CASE
            WHEN claims < 1 OR (of_consumer AND claims < 2) THEN wakeup_at
            WHEN of_consumer THEN now() + interval '5 s'
            WHEN divided.size > 1 OR claims < 2 THEN now() + divided.half * interval '1 us'
            ELSE now() + (1 + random()) * interval '5 s'
        END
    FROM divided
    WHERE task.id = ANY (ARRAY (SELECT id FROM divided))
      AND task.id = divided.id
    RETURNING task.id
),
following AS MATERIALIZED (
    SELECT (extract(epoch FROM lock_expires_at) - extract(epoch FROM now()))::float8 AS seconds
    FROM pg_task
    WHERE locked_by IS NOT NULL
      AND lock_expires_at >= greatest(now(), to_timestamp($5))
    ORDER BY lock_expires_at
    LIMIT 1
)
SELECT
    freed.tasks,
    next_end.seconds,
    extract(epoch FROM now())::float8,
    date_part('epoch', clock_timestamp() - statement_timestamp()) + 0 * (freed.tasks + next_end.leases)
FROM (SELECT count(*) AS tasks FROM expired) AS freed
CROSS JOIN (SELECT max(seconds) AS seconds, count(*) AS leases FROM following) AS next_end
