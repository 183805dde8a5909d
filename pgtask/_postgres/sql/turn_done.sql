-- Finish the tasks $1, whose rows this transaction has locked by turn_lock.sql.
--
-- The lock is the fence, so it counts in that transaction only, which has the setting $2.
DELETE FROM pg_task
WHERE id = ANY ($1::uuid[])
  AND current_setting('pgtask.held', true) = $2
