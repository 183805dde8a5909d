-- Make the tasks $1 due at the time $2: waiting ones as they are, parked ones without an error and with all their
-- retries. A task under a live lease is left alone, and so is one behind another, and a run that
-- pauses. Returns the columns of retry.sql.
--
-- Plan: OFFSET 0 has the planner look up each of these rows by itself, by the primary key, with any statistics.
WITH target AS (
    SELECT $2::timestamptz AS at
),
requested AS (
    SELECT DISTINCT id
    FROM unnest($1::uuid[]) AS requested (id)
),
free AS MATERIALIZED (
    SELECT id
    FROM pg_task
    WHERE id = ANY ($1::uuid[])
-- include: shared/unleased.sql
-- include: shared/not_paused.sql
      AND behind IS NULL
    ORDER BY id
    FOR NO KEY UPDATE
),
changed AS (
    -- include: shared/rescheduled.sql
)
-- include: shared/changed_and_told.sql
