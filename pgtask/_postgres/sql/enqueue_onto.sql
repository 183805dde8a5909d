-- Insert tasks with keys, where others may have these: ids $1, steps $2, times $3 or delays in seconds $4, queues $5,
-- priorities $6, keys $7 (each key once), times $8 or seconds $9 after which they expire.
--
--   $10  what to do if the other one waits or runs: 'keep'; 'replace': one that waits takes the new step, lane and times,
--        as if it had been enqueued now; 'after': the new one waits behind one that runs, or that has another step. One
--        that waits at the same step is enough: it is due and expires as either of the two would be that runs for sure
--   $11  if it is parked: 'keep'; 'revive': it is due now, at the step where it was parked; 'replace'
--   $12  debounce in seconds: one that waits is put off by that from now, and takes the new step,
--   $13  but not later than so many seconds after it was enqueued (null: without end)
--   $14  the trace of all, or null; a task that takes the new step takes it too
--
-- With 'replace', 'after' and a debounce, the new one waits behind one that runs; if a task waits there already, that
-- takes the new step, also if the other one has just gone: then a worker makes it due.
--
-- Returns for each key the task that has the step now, the key, and the outcome: 'new'; 'behind': new, behind another;
-- 'kept', 'replaced' (it has the new step) or 'revived'. No row for a task that a trigger or rule of the user's keeps out.
-- RETURNING does not show what a row was, so a task is known to be revived, or replaced while it was parked, by the time
-- at which it is due now.
--
-- The update locks the other task until the caller commits, whatever it changes: a worker that claims it later sees what
-- the caller has written before, and one that has it now is found out. Lock order: by the keys, a task before the one
-- behind it. Plan: each key by the index of keys; an EXISTS would let the planner read all keys once.
WITH new AS MATERIALIZED (
    SELECT
        id,
        step,
        coalesce(at, clock_timestamp() + make_interval(secs => coalesce(delay, $12::float8, 0))) AS due,
        queue,
        priority,
        key,
        coalesce(expires_at, clock_timestamp() + make_interval(secs => expires_in)) AS expires_at,
        ($10::text <> 'keep' OR $12::float8 IS NOT NULL)
            AND (SELECT true FROM pg_task WHERE pg_task.key = '/' || one.key) IS TRUE
            AND (SELECT true FROM pg_task WHERE pg_task.key = one.key) IS NULL AS joins
    FROM unnest($1::uuid[], $2::text[], $3::timestamptz[], $4::float8[], $5::text[], $6::smallint[], $7::text[],
        $8::timestamptz[], $9::float8[])
        AS one (id, step, at, delay, queue, priority, key, expires_at, expires_in)
),
put AS (
    INSERT INTO pg_task AS task (id, step, wakeup_at, queue, priority, key, expires_at, trace)
    SELECT id, step, due, queue, priority, key, expires_at, $14::text
    FROM new
    WHERE NOT joins
    ON CONFLICT (key) WHERE key IS NOT NULL DO UPDATE
    SET (step, queue, priority, wakeup_at, expires_at, tried, claims, error, trace) = (
        SELECT
            CASE WHEN takes THEN excluded.step ELSE task.step END,
            CASE WHEN takes THEN excluded.queue ELSE task.queue END,
            CASE WHEN takes THEN excluded.priority ELSE task.priority END,
            CASE
                WHEN revives THEN statement_timestamp()
                WHEN takes AND task.error IS NULL AND $12::float8 IS NOT NULL
                    THEN least(excluded.wakeup_at, task.created_at + make_interval(secs => $13::float8))
                WHEN takes THEN excluded.wakeup_at
                WHEN is_enough AND task.tried = 0 THEN least(task.wakeup_at, excluded.wakeup_at)
                ELSE task.wakeup_at
            END,
            CASE
                WHEN takes THEN excluded.expires_at
                WHEN revives OR (is_enough AND excluded.expires_at IS NULL) THEN NULL
                WHEN is_enough AND task.expires_at IS NOT NULL THEN greatest(task.expires_at, excluded.expires_at)
                ELSE task.expires_at
            END,
            CASE WHEN takes OR revives THEN 0 ELSE task.tried END,
            CASE WHEN takes OR revives THEN 0 ELSE task.claims END,
            CASE WHEN takes OR revives THEN NULL ELSE task.error END,
            CASE WHEN takes THEN excluded.trace ELSE task.trace END
        FROM (
            SELECT
                CASE
                    WHEN task.error IS NOT NULL THEN $11::text = 'replace'
                    ELSE task.locked_by IS NULL AND ($10::text = 'replace' OR $12::float8 IS NOT NULL)
                END AS takes,
                task.error IS NULL AND task.locked_by IS NULL AND $10::text = 'after' AND task.step = excluded.step AS is_enough,
                task.error IS NOT NULL AND $11::text = 'revive' AS revives
        ) AS rule
    )
    RETURNING id, key, step, wakeup_at, locked_by IS NOT NULL AS runs, error IS NOT NULL AS is_parked
),
behind AS (
    INSERT INTO pg_task AS task (id, step, wakeup_at, queue, priority, key, behind, expires_at, trace)
    SELECT new.id, new.step, 'infinity', new.queue, new.priority, '/' || new.key, new.due, new.expires_at, $14::text
    FROM new
    LEFT JOIN put ON put.key = new.key
    WHERE new.joins
       OR (
           put.id <> new.id
           AND NOT put.is_parked
           AND ($10::text <> 'keep' OR $12::float8 IS NOT NULL)
           AND (put.runs OR put.step <> new.step)
       )
    ON CONFLICT (key) WHERE key IS NOT NULL DO UPDATE
    SET step = excluded.step,
        queue = excluded.queue,
        priority = excluded.priority,
        expires_at = excluded.expires_at,
        trace = excluded.trace,
        behind = CASE
            WHEN $12::float8 IS NULL THEN least(task.behind, excluded.behind)
            ELSE least(excluded.behind, task.created_at + make_interval(secs => $13::float8))
        END
    RETURNING id, substr(key, 2) AS key
)
SELECT
    coalesce(behind.id, put.id) AS id,
    new.key,
    CASE
        WHEN behind.id = new.id THEN 'behind'
        WHEN behind.id IS NOT NULL THEN 'replaced'
        WHEN put.id = new.id THEN 'new'
        WHEN put.runs OR put.is_parked THEN 'kept'
        WHEN $11::text = 'revive' AND put.wakeup_at = statement_timestamp() THEN 'revived'
        WHEN put.step <> new.step THEN 'kept'
        WHEN $10::text = 'replace' OR $12::float8 IS NOT NULL OR ($11::text = 'replace' AND put.wakeup_at = new.due) THEN 'replaced'
        ELSE 'kept'
    END AS outcome,
    CASE WHEN behind.id = new.id THEN pg_notify('pg_task_changed', 'behind')::text END
FROM new
LEFT JOIN put ON put.key = new.key
LEFT JOIN behind ON behind.key = new.key
WHERE coalesce(behind.id, put.id) IS NOT NULL
