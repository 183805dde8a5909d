-- Lock up to $3 due tasks of one lane (queue $1, priority $2), oldest first, until the end of the transaction. Steps larger
-- than $4 bytes are not sent.
--
-- The lock takes the place of a lease (hold.py). It skips tasks that fell due before $5 (seconds since the epoch), as
-- claim.sql does. FOR UPDATE, since most of these rows are deleted: it skips a row to which another session has a foreign
-- key lock. now() is the beginning of the transaction, which may have been a while ago. The last column is its group. Plan: the limit stands above the
-- lock, so it locks no row that it does not return.
SELECT
    id,
    CASE WHEN octet_length(step) <= $4 THEN step END,
    tried,
    claims,
    CASE
        WHEN octet_length(step) > $4 THEN octet_length(step)
        WHEN expires_at < statement_timestamp() AND tried = 0 THEN -1
    END,
    date_part('epoch', wakeup_at)
    -- traced: , trace, CASE WHEN trace IS NOT NULL THEN queue END
    , group_id
FROM pg_task
WHERE queue = $1
  AND priority = $2
  AND wakeup_at <= statement_timestamp()
  AND wakeup_at >= to_timestamp($5)
  AND locked_by IS NULL
  AND error IS NULL
ORDER BY wakeup_at
LIMIT $3
FOR UPDATE SKIP LOCKED
