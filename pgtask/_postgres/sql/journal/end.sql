-- End runs: $1 under the tokens $2. Without an error ($3 is null) the run is finished with the output $4 and its task is
-- deleted; with one, its task is parked, after $5 failed tries. Versions $6 as in record.sql. $7 and $8: the checkpoints to
-- forget, as pairs of run and number: uncaught failures, which a revived run must not meet again. $9 to $18: the last
-- checkpoints of these runs, as $1 and $3 to $11 of record.sql; those of a later try take over the row of an earlier one.
--
-- Wakes the parents that wait for these runs, and notifies the callers that wait for their results. Returns the runs that
-- are held, null for all; and for finished runs the count of signals of each name that they leave unread.
--
-- Lock order: the task of the run, its record, its checkpoints to forget and to take over; then, if its parent waits for
-- it, the parent's task and record. Waits for no lock: a run that lacks one of these rows is not held. Nor is a run that got a
-- signal since this statement began, which this statement cannot see: a signal changes wakeup_at.
--
-- Plan: by the primary keys, independent of statistics. A write joins nothing: it takes its values by their position, or
-- is an INSERT that meets its row. The id of a record is also the last column of another index, so a look-up asks for the
-- order of the ids.
WITH ours AS MATERIALIZED (
    SELECT entry.*, task.step, task.wakeup_at
    FROM unnest($1::uuid[], $2::uuid[], $3::text[], $4::text[], $5::integer[], $6::integer[])
        AS entry (run, token, error, output, tried, version)
    CROSS JOIN LATERAL (
        SELECT step, wakeup_at
        FROM pg_task
        WHERE id = entry.run
          AND locked_by IS NOT DISTINCT FROM entry.token
        FOR UPDATE SKIP LOCKED
    ) AS task
),
child AS MATERIALIZED (
    SELECT
        ours.*,
        record.id IS NOT NULL AS has_record,
        CASE WHEN record.awaited THEN record.parent END AS parent
    FROM ours
    LEFT JOIN LATERAL (
        SELECT id, parent, awaited
        FROM pg_task_runs
        WHERE id BETWEEN ours.run AND ours.run
        ORDER BY id
        LIMIT 1
        FOR NO KEY UPDATE SKIP LOCKED
    ) AS record ON true
    WHERE record.id IS NOT NULL
       OR (SELECT id FROM pg_task_runs AS seen WHERE seen.id BETWEEN ours.run AND ours.run ORDER BY id LIMIT 1) IS NULL
),
failure AS MATERIALIZED (
    SELECT
        failure.run,
        failure.number,
        locked.run IS NULL
        AND (
            SELECT run FROM pg_task_checkpoints AS seen WHERE seen.run = failure.run AND seen.number = failure.number
        ) IS NOT NULL AS is_skipped
    FROM unnest($7::uuid[], $8::integer[]) AS failure (run, number)
    LEFT JOIN LATERAL (
        SELECT run
        FROM pg_task_checkpoints
        WHERE run = failure.run
          AND number = failure.number
        FOR UPDATE SKIP LOCKED
    ) AS locked ON true
    WHERE failure.run = ANY (ARRAY (SELECT run FROM child))
),
taken_over AS MATERIALIZED (
    SELECT
        later.run,
        locked.run IS NULL
        AND (
            SELECT run FROM pg_task_checkpoints AS seen WHERE seen.run = later.run AND seen.number = later.number
        ) IS NOT NULL AS is_skipped
    FROM unnest($9::uuid[], $10::integer[], $16::timestamptz[], $17::integer[]) AS later (run, number, due_at, tried)
    LEFT JOIN LATERAL (
        SELECT run
        FROM pg_task_checkpoints
        WHERE run = later.run
          AND number = later.number
        FOR NO KEY UPDATE SKIP LOCKED
    ) AS locked ON true
    WHERE (later.tried > 0 OR later.due_at IS NOT NULL)
      AND later.run = ANY (ARRAY (SELECT run FROM child))
),
parent_task AS MATERIALIZED (
    SELECT id
    FROM pg_task
    WHERE id = ANY (ARRAY (SELECT DISTINCT parent FROM child WHERE parent IS NOT NULL))
    FOR NO KEY UPDATE SKIP LOCKED
),
parent_record AS MATERIALIZED (
    SELECT id
    FROM pg_task_runs
    WHERE id = ANY (ARRAY (SELECT DISTINCT parent FROM child WHERE parent IS NOT NULL))
    ORDER BY id
    FOR NO KEY UPDATE SKIP LOCKED
),
skipped_parent AS MATERIALIZED (
    SELECT parent
    FROM (SELECT DISTINCT parent FROM child WHERE parent IS NOT NULL) AS awaiting
    WHERE (
            parent <> ALL (ARRAY (SELECT id FROM parent_task))
            AND (SELECT id FROM pg_task AS seen WHERE seen.id = awaiting.parent) IS NOT NULL
        )
       OR (
            parent <> ALL (ARRAY (SELECT id FROM parent_record))
            AND (
                SELECT id FROM pg_task_runs AS seen WHERE seen.id BETWEEN awaiting.parent AND awaiting.parent ORDER BY id LIMIT 1
            ) IS NOT NULL
        )
),
held AS MATERIALIZED (
    SELECT *
    FROM child
    WHERE coalesce(parent <> ALL (ARRAY (SELECT parent FROM skipped_parent)), true)
      AND run <> ALL (ARRAY (SELECT run FROM failure WHERE is_skipped))
      AND run <> ALL (ARRAY (SELECT run FROM taken_over WHERE is_skipped))
      AND wakeup_at = (SELECT seen.wakeup_at FROM pg_task AS seen WHERE seen.id = child.run)
),
unread AS MATERIALIZED (
    SELECT run, name, count(*) AS signals
    FROM held, LATERAL (SELECT name FROM pg_task_signals WHERE pg_task_signals.run = held.run OFFSET 0) AS signal
    WHERE error IS NULL
    GROUP BY run, name
),
finished AS (
    DELETE FROM pg_task
    WHERE id = ANY (ARRAY (SELECT run FROM held WHERE error IS NULL))
),
parked AS (
    UPDATE pg_task AS task
    SET error = ($3::text[])[array_position($1::uuid[], task.id)],
        tried = ($5::integer[])[array_position($1::uuid[], task.id)],
        wakeup_at = now(),
        locked_by = NULL,
        lock_expires_at = NULL,
        claims = 0,
        updated_at = now()
    WHERE task.id = ANY (ARRAY (SELECT run FROM held WHERE error IS NOT NULL))
),
-- The subquery is hashed; a join would compare each of the checkpoints with each of the runs.
arrived AS MATERIALIZED (
    SELECT *
    FROM unnest(
        $9::uuid[], $10::integer[], $11::text[], $12::text[], $13::text[], $14::text[], $15::text[], $16::timestamptz[],
        $17::integer[], $18::float8[]
    ) AS entry (run, number, place, kind, name, result, error, due_at, tried, seconds)
    WHERE (run IN (SELECT run FROM held)) IS TRUE
),
-- include: shared/recorded.sql
forgotten AS (
    DELETE FROM pg_task_checkpoints
    WHERE run = ANY (ARRAY (SELECT run FROM failure WHERE run = ANY (ARRAY (SELECT run FROM held))))
      AND number = ANY (ARRAY (SELECT number FROM failure))
      AND ((run, number) IN (SELECT run, number FROM failure)) IS TRUE
),
ended AS (
    INSERT INTO pg_task_runs AS run (id, name, state, step, output, error, version, started_at, ended_at)
    SELECT
        run,
        '',
        CASE WHEN error IS NULL THEN 'SUCCESS' ELSE 'ERROR' END,
        CASE WHEN error IS NULL THEN step END,
        output,
        error,
        version,
        CASE WHEN run IN (SELECT run FROM arrived) THEN now() END,
        now()
    FROM held
    WHERE has_record
    ON CONFLICT (id) DO UPDATE
    SET state = excluded.state,
        step = excluded.step,
        output = excluded.output,
        error = excluded.error,
        version = coalesce(run.version, excluded.version),
        started_at = coalesce(run.started_at, excluded.started_at),
        ended_at = excluded.ended_at
    RETURNING run.id, CASE WHEN run.awaited THEN run.parent END AS parent
),
-- include: shared/ended.sql
SELECT
    CASE WHEN count(*) < cardinality($1::uuid[]) THEN coalesce(array_agg(run), '{}') END,
    (
        SELECT json_object_agg(run, names)::text
        FROM (SELECT run, json_object_agg(name, signals) AS names FROM unread GROUP BY run) AS of_run
    ),
    (SELECT count(*) FROM notified)
FROM held
