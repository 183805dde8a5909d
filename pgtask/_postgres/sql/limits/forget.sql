-- Delete up to 1,000 keys of limits of which nothing is to be known any more: all is paid for, none pauses or has failed.
DELETE FROM pg_task_limit_keys
WHERE limit_key = ANY (ARRAY (
    SELECT limit_key
    FROM pg_task_limit_keys
    WHERE failures = 0
      AND coalesce(greatest(next_at, cost_next_at, paused_until, turn_at) < now() - interval '1 minute', true)
    LIMIT 1000
    FOR UPDATE SKIP LOCKED
))
