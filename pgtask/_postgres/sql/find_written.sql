-- Find what became of a transaction that has written the outcomes of the tasks $1 under the tokens $2 at the position $3,
-- and whose COMMIT was not answered. Returns the tasks that are still ours, and whether each was written by it.
--
-- While that transaction is open it has locked these rows, and this statement waits, as long as its session allows.
-- Afterwards a row that it has written is gone, or without our token, or at that position.
SELECT id, position >= $3::bigint
FROM pg_task
    -- include: shared/our_leases.sql
FOR NO KEY UPDATE
