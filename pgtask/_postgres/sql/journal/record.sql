-- Record a batch of checkpoints: runs $1 under the tokens $2, numbers $3, places $4, kinds $5 (null: step), names $6, results
-- $7, errors $8, due at $9, failed tries $10 (null: none), seconds $11, and the version $12 of the workflow (null unless it
-- is the run's first checkpoint).
--
-- The statement may be sent again, and arrive late.
--
-- Returns the runs whose lease is held, null for all: the others have lost it, or another session has locked the row of
-- the task, the record (if this is the first checkpoint) or the checkpoint (if it is there). Lock order: as named.
WITH fenced AS MATERIALIZED (
    SELECT entry.*, task.claims
    FROM unnest(
        $1::uuid[], $2::uuid[], $3::integer[], $4::text[], $5::text[], $6::text[], $7::text[], $8::text[],
        $9::timestamptz[], $10::integer[], $11::float8[], $12::integer[]
    ) AS entry (run, token, number, place, kind, name, result, error, due_at, tried, seconds, version)
    -- include: shared/fence.sql
),
held AS MATERIALIZED (
    SELECT fenced.*, record.id AS record
    FROM fenced
    LEFT JOIN LATERAL (
        SELECT run
        FROM pg_task_checkpoints
        WHERE run = fenced.run
          AND number = fenced.number
          AND (fenced.tried > 0 OR fenced.due_at IS NOT NULL)
        FOR NO KEY UPDATE SKIP LOCKED
    ) AS checkpoint ON true
    -- include: shared/begun.sql
    AND (
        (coalesce(fenced.tried, 0) = 0 AND fenced.due_at IS NULL)
        OR checkpoint.run IS NOT NULL
        OR (
            SELECT run FROM pg_task_checkpoints AS seen WHERE seen.run = fenced.run AND seen.number = fenced.number
        ) IS NULL
    )
),
progressed AS (
    SELECT run, claims
    FROM held
),
-- include: shared/progress.sql
arrived AS NOT MATERIALIZED (
    SELECT *
    FROM held
),
-- include: shared/recorded.sql
written AS (
    SELECT count(*) AS entries, array_agg(run) AS runs
    FROM held
)
SELECT CASE WHEN entries < cardinality($1::uuid[]) THEN coalesce(runs, '{}') END
FROM written
