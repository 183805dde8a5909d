-- Make children: ids $5 of the workflows $6 with the steps $7, queues $8 and priorities $9, for the runs $4. Each of the
-- runs $1 is fenced by its token $2; the versions $3 are as in record.sql. $10 to $13: the checkpoints that say so, their
-- numbers, places, names and results.
--
-- A child whose record is there is not made again, whatever has become of it: so this may be sent again. What comes back
-- are the runs that are held, null for all.
WITH held AS MATERIALIZED (
    SELECT spawn.*, task.claims
    FROM unnest($1::uuid[], $2::uuid[], $3::integer[], $10::integer[], $11::text[], $12::text[], $13::text[])
        AS spawn (run, token, version, number, place, name, result)
    JOIN pg_task AS task ON task.id = spawn.run AND task.locked_by = spawn.token
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
-- As in record.sql.
cleared AS (
    UPDATE pg_task
    SET claims = 1
    WHERE id = ANY (ARRAY (SELECT run FROM held WHERE claims > 1))
),
recorded AS (
    INSERT INTO pg_task_checkpoints (run, number, place, kind, name, result)
    SELECT run, number, place, 'spawn', name, result
    FROM held
    ON CONFLICT DO NOTHING
),
child AS MATERIALIZED (
    SELECT *
    FROM unnest($4::uuid[], $5::uuid[], $6::text[], $7::text[], $8::text[], $9::smallint[])
        AS child (run, id, name, step, queue, priority)
    WHERE run = ANY (ARRAY (SELECT run FROM held))
      AND NOT EXISTS (SELECT FROM pg_task_runs WHERE pg_task_runs.id = child.id)
),
made AS (
    INSERT INTO pg_task_runs (id, name, parent)
    SELECT id, name, run
    FROM child
),
enqueued AS (
    INSERT INTO pg_task (id, step, queue, priority)
    SELECT id, step, queue, priority
    FROM child
)
SELECT CASE WHEN count(*) < cardinality($1::uuid[]) THEN coalesce(array_agg(run), '{}') END
FROM held
