-- Record a batch of checkpoints: runs $1 under the tokens $2, numbers $3, places $4, kinds $5, names $6, results $7,
-- errors $8, due at $9, failed tries $10, seconds $11, and the version $12 of the workflow (null unless it is the run's
-- first checkpoint).
--
-- A step that is put off ($9: until when) has a checkpoint that a later try, or its result, takes over under the same
-- number. What is complete stays as it is, and tries only grow: so this may be sent again, and come late.
--
-- The row of the run's task is locked to the end, so that nobody takes the run over in between. What comes back are the
-- runs whose lease is held, null for all: those that are missing have lost it, or somebody else has locked the row.
WITH held AS MATERIALIZED (
    SELECT checkpoint.*, task.claims
    FROM unnest(
        $1::uuid[], $2::uuid[], $3::integer[], $4::text[], $5::text[], $6::text[], $7::text[], $8::text[],
        $9::timestamptz[], $10::integer[], $11::float8[], $12::integer[]
    ) AS checkpoint (run, token, number, place, kind, name, result, error, due_at, tried, seconds, version)
    JOIN pg_task AS task ON task.id = checkpoint.run AND task.locked_by = checkpoint.token
    FOR SHARE OF task SKIP LOCKED
),
begun AS (
    UPDATE pg_task_runs AS run
    SET version = held.version,
        started_at = now()
    FROM held
    WHERE run.id = held.run
      AND held.version IS NOT NULL
),
-- A run that gets on has not killed its worker: claims that ended without an outcome count up to a checkpoint only.
cleared AS (
    UPDATE pg_task
    SET claims = 1
    WHERE id = ANY (ARRAY (SELECT run FROM held WHERE claims > 1))
),
recorded AS (
    INSERT INTO pg_task_checkpoints (run, number, place, kind, name, result, error, due_at, tried, seconds)
    SELECT run, number, place, kind, name, result, error, due_at, tried, seconds
    FROM held
    ON CONFLICT DO NOTHING
),
tried_again AS (
    UPDATE pg_task_checkpoints AS checkpoint
    SET result = held.result,
        error = held.error,
        due_at = held.due_at,
        tried = held.tried,
        seconds = held.seconds,
        recorded_at = now()
    FROM held
    WHERE held.tried > 0
      AND checkpoint.run = held.run
      AND checkpoint.number = held.number
      AND checkpoint.kind = 'step'
      AND checkpoint.due_at IS NOT NULL
      AND checkpoint.tried <= held.tried
)
SELECT CASE WHEN count(*) < cardinality($1::uuid[]) THEN coalesce(array_agg(run), '{}') END
FROM held
