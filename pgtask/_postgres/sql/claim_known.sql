-- Claim as claim.sql does, from a lane with tasks of another app: skip the tasks whose envelope (with its key, shared/envelope.sql) $8 matches
-- (null: none);
-- and, unless $10, suspects too, as claim_unsuspected.sql does. It takes no task that falls due after $11 (seconds since
-- the epoch), so that it can take tasks before the floor of their lane, and not read the dead entries up to that floor.
--
-- Reads up to $9 waiting tasks in the order of their time, without a lock. It locks a row when it takes it, and skips
-- it if another session was faster. A CTE is read only as far as it is needed. The check that a row is still free has a
-- form that matches no partial index, so the planner uses the primary key, independent of its statistics.
WITH seen AS MATERIALIZED (
    SELECT
        id,
        (
            $8::text IS NULL
            OR
            -- include: shared/envelope.sql
            !~ $8
        ) AND ($10 OR claims = 0) AS known
    FROM pg_task
    WHERE queue = $1
      AND priority = $2
      AND wakeup_at <= now()
      AND wakeup_at >= to_timestamp($7)
      AND wakeup_at <= to_timestamp($11)
      AND locked_by IS NULL
      AND error IS NULL
    ORDER BY wakeup_at
    LIMIT $9
),
picked AS MATERIALIZED (
    SELECT free.id
    FROM seen
    CROSS JOIN LATERAL (
        SELECT id
        FROM pg_task
        WHERE id = seen.id
          AND coalesce(locked_by::text, error) IS NULL
        FOR NO KEY UPDATE SKIP LOCKED
    ) AS free
    WHERE seen.known
    LIMIT $3
)
-- include: shared/claim_picked.sql
