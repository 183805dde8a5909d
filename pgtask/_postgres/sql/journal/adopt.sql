-- Runs $1 under the tokens $2, of the workflows $3, that are live without a record (triggered by a plain INSERT INTO
-- pg_task), or with that of an earlier end (revived by UPDATE pg_task SET error = NULL): make the record say that they
-- have not ended. What comes back are the runs that are held, null for all. May be sent again.
WITH held AS MATERIALIZED (
    SELECT lease.run, lease.name
    FROM unnest($1::uuid[], $2::uuid[], $3::text[]) AS lease (run, token, name)
    JOIN pg_task AS task ON task.id = lease.run AND task.locked_by = lease.token
    FOR SHARE OF task SKIP LOCKED
),
adopted AS (
    INSERT INTO pg_task_runs AS run (id, name)
    SELECT run, name
    FROM held
    ON CONFLICT (id) DO UPDATE
    SET state = NULL,
        error = NULL,
        ended_at = NULL
    WHERE run.state = 'ERROR'
)
SELECT CASE WHEN count(*) < cardinality($1::uuid[]) THEN coalesce(array_agg(run), '{}') END
FROM held
