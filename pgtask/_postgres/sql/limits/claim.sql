-- Claim tasks that wait for the limit $1: at most $4 of the queues $2 (null: all) and not of the queues $3, under the lease token $5 for $6
-- seconds. Steps larger than $7 bytes are not sent, envelopes that match $8 are left out, and suspects unless $9. The keys
-- $10 come first, then up to $12 keys behind the key $11. pg_task_claim_limited (020) says what it returns.
SELECT
    id,
    step,
    tried,
    claims,
    size,
    due
    -- traced: , trace, queue
    , group_id, limit_key, failures
FROM pg_task_claim_limited($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, $12)
