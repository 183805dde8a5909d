-- Make those of the tasks $1 due at the time $8 that the filter $2 to $7 still chooses, as reschedule.sql does; returns
-- the number. Passes over what is due then already, what a worker holds, runs that pause, and rows that another session
-- has locked. Runs after together.sql.
WITH target AS (
    SELECT $8::timestamptz AS at
),
free AS MATERIALIZED (
    SELECT id
    FROM pg_task
    WHERE id = ANY ($1::uuid[])
-- include: shared/matching.sql
-- include: shared/reschedulable.sql
    ORDER BY id
    FOR NO KEY UPDATE SKIP LOCKED
),
changed AS (
    -- include: shared/rescheduled.sql
),
-- include: shared/revived.sql
-- include: shared/all_told.sql
