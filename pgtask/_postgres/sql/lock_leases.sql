-- Lock the tasks $1 under the tokens $2 until the end of this transaction, and return them. No other session can renew or
-- expire these leases then: those skip locked rows.
SELECT id
FROM pg_task
    -- include: shared/our_leases.sql
FOR NO KEY UPDATE
