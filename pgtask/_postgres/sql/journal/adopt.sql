-- Make the records of live runs say that they have not ended: runs $1 under the tokens $2, of the workflows $3. They have
-- no record (triggered by a plain INSERT INTO pg_task), or that of an earlier end (revived by UPDATE pg_task SET error =
-- NULL). Returns the runs whose lease is held, null for all: the others have lost it, or another session has locked the
-- row of the task, or the record. May be sent again.
WITH fenced AS MATERIALIZED (
    SELECT entry.run, entry.name, 1 AS version
    FROM unnest($1::uuid[], $2::uuid[], $3::text[]) AS entry (run, token, name)
    -- include: shared/fence.sql
),
held AS MATERIALIZED (
    SELECT fenced.*
    FROM fenced
    -- include: shared/begun.sql
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
