-- Runs $1 of the workflows $2 that are live without a record (triggered by a plain INSERT INTO pg_task), or with that of
-- an earlier end (revived by UPDATE pg_task SET error = NULL): make the record say that they have not ended.
INSERT INTO pg_task_runs AS run (id, name)
SELECT *
FROM unnest($1::uuid[], $2::text[])
ON CONFLICT (id) DO UPDATE
SET state = NULL,
    error = NULL,
    ended_at = NULL
WHERE run.state = 'ERROR'
