-- Take up to $3 due tasks of one lane (queue $1, priority $2), oldest first, under the lease token $4 for $5 seconds.
-- Steps larger than $6 bytes are not sent.
--
-- The sub-select is MATERIALIZED, so it runs once and never locks more than $3 rows. It skips tasks that fell due
-- before $7 (seconds since the epoch): the index entries of finished tasks lie there, and while some transaction keeps
-- them alive, each claim would read all of them again.
WITH picked AS MATERIALIZED (
    SELECT id
    FROM pg_task
    WHERE queue = $1
      AND priority = $2
      AND wakeup_at <= now()
      AND wakeup_at >= to_timestamp($7)
      AND locked_by IS NULL
      AND error IS NULL
    ORDER BY wakeup_at
    LIMIT $3
    FOR NO KEY UPDATE SKIP LOCKED
)
-- include: shared/claim_picked.sql
