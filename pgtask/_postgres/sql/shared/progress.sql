-- The first entry of a run tells its version. It changes nothing if it is sent again, and arrives late.
begun AS (
    INSERT INTO pg_task_runs AS run (id, name, version, started_at)
    SELECT DISTINCT ON (record) record, '', version, now()
    FROM held
    WHERE record IS NOT NULL
    ORDER BY record
    ON CONFLICT (id) DO UPDATE
    SET version = coalesce(run.version, excluded.version),
        started_at = coalesce(run.started_at, excluded.started_at)
),
-- A run that makes progress has not killed its worker: claims without an outcome count up to a checkpoint only.
cleared AS (
    UPDATE pg_task
    SET claims = 1
    WHERE id = ANY (ARRAY (SELECT run FROM progressed WHERE claims > 1))
),
