-- Claim as claim.sql does, with one more condition: leave suspects, whose last claim ended without an outcome, to other
-- workers. For a worker that cannot run them soon: a group of suspects stays whole until a worker can take it.
WITH picked AS MATERIALIZED (
    SELECT id
    FROM pg_task
    WHERE queue = $1
      AND priority = $2
      AND wakeup_at <= now()
      AND wakeup_at >= to_timestamp($7)
      AND locked_by IS NULL
      AND error IS NULL
      AND claims = 0
    ORDER BY wakeup_at
    LIMIT $3
    FOR NO KEY UPDATE SKIP LOCKED
)
-- include: shared/claim_picked.sql
