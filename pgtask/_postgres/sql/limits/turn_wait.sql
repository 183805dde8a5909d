-- Have the tasks $1, whose rows this transaction has locked by turn_lock.sql, wait for their limits, with the keys $3 and the
-- costs $4. Those that turn_end.sql leases after this run under the limit: it counts them then.
--
-- The lock is the fence, so it counts in that transaction only, which has the setting $2. Sets updated_at, or a trigger
-- would. Plan: by arrays of one id, as flush.sql says.
UPDATE pg_task AS task
    -- include: shared/limited.sql
        updated_at = now()
    -- include: shared/limit_entries.sql
    WHERE task.id = ANY (ARRAY[entry.id])
      AND current_setting('pgtask.held', true) = $2
