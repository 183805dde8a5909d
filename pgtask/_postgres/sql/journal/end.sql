-- End runs: $1 under the tokens $2. Without an error ($3 is null) the run is finished with the output $4 and its task
-- goes; with one, its task is parked, after $5 failed tries. Versions $6 as in record.sql. $7 and $8: what is forgotten, as
-- pairs of run and number of checkpoint: failures that were not caught, so that they are not met again if somebody revives
-- the run.
--
-- Wakes the parents that are paused and wait for these, and tells those who wait for results. What comes back are the
-- runs that are held, null for all. A parent's task is locked before its record is written, and nothing here waits for a
-- lock of pg_task while it has one: a run whose parent's task is locked is not held, this time.
WITH ours AS MATERIALIZED (
    SELECT outcome.*, task.step
    FROM unnest($1::uuid[], $2::uuid[], $3::text[], $4::text[], $5::integer[], $6::integer[])
        AS outcome (run, token, error, output, tried, version)
    JOIN pg_task AS task ON task.id = outcome.run AND task.locked_by = outcome.token
    FOR UPDATE OF task SKIP LOCKED
),
child AS MATERIALIZED (
    SELECT ours.*, run.parent
    FROM ours
    LEFT JOIN pg_task_runs AS run ON run.id = ours.run
),
parents AS MATERIALIZED (
    SELECT id
    FROM pg_task
    WHERE id = ANY (ARRAY (SELECT DISTINCT parent FROM child WHERE parent IS NOT NULL))
    FOR NO KEY UPDATE SKIP LOCKED
),
held AS MATERIALIZED (
    SELECT *
    FROM child
    WHERE parent IS NULL
       OR parent = ANY (ARRAY (SELECT id FROM parents))
       OR NOT EXISTS (SELECT FROM pg_task WHERE id = child.parent)
),
finished AS (
    DELETE FROM pg_task AS task
    USING held
    WHERE task.id = held.run
      AND held.error IS NULL
),
parked AS (
    UPDATE pg_task AS task
    SET error = held.error,
        tried = held.tried,
        wakeup_at = now(),
        locked_by = NULL,
        lock_expires_at = NULL,
        claims = 0,
        updated_at = now()
    FROM held
    WHERE task.id = held.run
      AND held.error IS NOT NULL
),
forgotten AS (
    DELETE FROM pg_task_checkpoints AS checkpoint
    USING unnest($7::uuid[], $8::integer[]) AS failure (run, number), held
    WHERE checkpoint.run = failure.run
      AND checkpoint.number = failure.number
      AND held.run = failure.run
),
ended AS (
    UPDATE pg_task_runs AS run
    SET state = CASE WHEN held.error IS NULL THEN 'SUCCESS' ELSE 'ERROR' END,
        step = CASE WHEN held.error IS NULL THEN held.step END,
        output = held.output,
        error = held.error,
        version = coalesce(run.version, held.version),
        ended_at = now()
    FROM held
    WHERE run.id = held.run
    RETURNING run.id, CASE WHEN run.awaited THEN run.parent END AS parent
),
told AS (
    UPDATE pg_task_runs AS run
    SET waits_for = waits_for - child.ended
    FROM (SELECT parent, count(*)::integer AS ended FROM ended WHERE parent IS NOT NULL GROUP BY parent) AS child
    WHERE run.id = child.parent
    RETURNING run.id, run.waits_for, run.paused_until
),
woken AS (
    UPDATE pg_task AS task
    SET wakeup_at = CASE
        WHEN task.locked_by IS NULL THEN least(task.wakeup_at, now())
        ELSE greatest(clock_timestamp(), task.wakeup_at + interval '1 microsecond')
    END
    FROM told
    WHERE task.id = told.id
      AND told.waits_for <= 0
      AND (task.locked_by IS NOT NULL OR task.wakeup_at = told.paused_until)
),
notified AS MATERIALIZED (
    SELECT pg_notify('pg_task_ended', string_agg(id::text, ','))
    FROM (SELECT id, row_number() OVER () / 200 AS part FROM ended) AS numbered
    GROUP BY part
)
SELECT CASE WHEN count(*) < cardinality($1::uuid[]) THEN coalesce(array_agg(run), '{}') END, (SELECT count(*) FROM notified)
FROM held
