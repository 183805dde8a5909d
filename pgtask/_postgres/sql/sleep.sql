-- Say that this session sleeps: from now on, a task for its queues notifies, see 009_sleepers.sql. $1: the queues, empty
-- for all. The locks are shared, and a writer has an exclusive one for a moment only: this does not wait. The session
-- keeps them until wake_up.sql, or its end.
SELECT pg_advisory_lock_shared(to_regclass('pg_task')::oid::integer, key)::text
FROM (
    SELECT 0
    UNION SELECT 1 WHERE cardinality($1::text[]) = 0
    UNION SELECT hashtext(name) FROM unnest($1::text[]) AS name
) AS wanted (key)
