-- Make those of the tasks $1 due that the filter $2 to $7 still chooses, as retry.sql does; returns the number. Passes
-- over what is due with all its retries, what a worker holds, and rows that another session has locked. Runs after
-- together.sql.
WITH free AS MATERIALIZED (
    SELECT id
    FROM pg_task
    WHERE id = ANY ($1::uuid[])
-- include: shared/matching.sql
-- include: shared/retriable.sql
    ORDER BY id
    FOR NO KEY UPDATE SKIP LOCKED
),
changed AS (
    -- include: shared/made_due.sql
),
-- include: shared/revived.sql
-- include: shared/all_told.sql
