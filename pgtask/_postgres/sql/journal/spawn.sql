-- Make children: ids $5 of the workflows $6 with the steps $7, queues $8 and priorities $9, for the runs $4. Each of the
-- runs $1 is fenced by its token $2; the versions $3 are as in record.sql. $10 to $13: the numbers, places, names and
-- results of the checkpoints that say so. Traced: $14, the traces of the children.
--
-- A child that has a record is not made again, whatever its state: so this may be sent again. Returns the runs whose lease
-- is held, null for all: the others have lost it, or another session has locked the row of the task, or the record (if
-- this is the first checkpoint).
WITH fenced AS MATERIALIZED (
    SELECT entry.*, task.claims
    FROM unnest($1::uuid[], $2::uuid[], $3::integer[], $10::integer[], $11::text[], $12::text[], $13::text[])
        AS entry (run, token, version, number, place, name, result)
    -- include: shared/fence.sql
),
held AS MATERIALIZED (
    SELECT fenced.*, record.id AS record
    FROM fenced
    -- include: shared/begun.sql
),
progressed AS (
    SELECT run, claims
    FROM held
),
-- include: shared/progress.sql
recorded AS (
    INSERT INTO pg_task_checkpoints (run, number, place, kind, name, result)
    SELECT run, number, place, 'spawn', name, result
    FROM held
    ON CONFLICT DO NOTHING
),
child AS MATERIALIZED (
    SELECT *
    FROM unnest(
        $4::uuid[], $5::uuid[], $6::text[], $7::text[], $8::text[], $9::smallint[]
        -- traced: , $14::text[]
    )
        AS child (
            run, id, name, step, queue, priority
            -- traced: , trace
        )
    WHERE run = ANY (ARRAY (SELECT run FROM held))
      AND (SELECT id FROM pg_task_runs AS made WHERE made.id BETWEEN child.id AND child.id ORDER BY id LIMIT 1) IS NULL
),
made AS (
    INSERT INTO pg_task_runs (id, name, parent)
    SELECT id, name, run
    FROM child
),
enqueued AS (
    INSERT INTO pg_task (
        id, step, queue, priority
        -- traced: , trace
    )
    SELECT
        id, step, queue, priority
        -- traced: , trace
    FROM child
)
SELECT CASE WHEN count(*) < cardinality($1::uuid[]) THEN coalesce(array_agg(run), '{}') END
FROM held
