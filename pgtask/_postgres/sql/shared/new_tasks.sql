-- The rest of a flush, behind the CTE `done`, that inserts new tasks as well: $17 the task whose outcome enqueues it, $18
-- its id, $19 step, $20 the time at which it is due, or $21 the seconds until then (both null: now), $22 queue, $23
-- priority, $24 key. Traced: $25 trace. Grouped: a new task is a member of the group of the task that enqueues it, and
-- counts there; $26 ids and $27 their results, as JSON.
--
-- A new task is inserted if this very statement writes the outcome of its task. What an earlier copy of this statement
-- has written, while its answer was lost, enqueues nothing again: a task that is done has no row, one that has left no
-- lease. One that goes on has its lease, but the position of this flush: `first` locks the rows that have a smaller one,
-- before `continued` writes it. Their locks make the copies take turns.
--
-- If a task in the table has the key of a new one, that one is not inserted. The outcomes are written before the first
-- insert, so a task that is done here hands its key on. If another session has inserted the key and not committed, the
-- statement waits for it, up to its lock_timeout.
--
-- If a trigger of the user's keeps a new task out that has no key, the statement fails, and nothing is written: the text
-- is no boolean.
--
-- Plan: rows by the primary key as in flush.sql. `written` is a hashed set, as our_leases.sql says, read to its end
-- before the first row is inserted.
first AS MATERIALIZED (
    SELECT id
    FROM pg_task
    WHERE id = ANY ($3::uuid[])
      AND ((id, locked_by) IN (SELECT * FROM unnest($3::uuid[], $4::uuid[]))) IS TRUE
      AND position < $6::bigint
    FOR NO KEY UPDATE
),
continued AS (
    -- include: shared/goes_on.sql
      AND (SELECT count(*) FROM first) >= 0
    RETURNING task.id
    -- grouped: , task.group_id
),
rescheduled AS (
    -- include: shared/leaves.sql
    RETURNING task.id
    -- grouped: , task.group_id, task.error
),
written AS MATERIALIZED (
    SELECT id
    -- grouped: , group_id
    FROM done
    UNION ALL
    SELECT id
    -- grouped: , group_id
    FROM continued
    WHERE (id IN (SELECT id FROM first)) IS TRUE
    UNION ALL
    SELECT id
    -- grouped: , group_id
    FROM rescheduled
),
-- grouped: parents AS MATERIALIZED (
-- grouped:     SELECT coalesce(jsonb_object_agg(id, -abs(group_id)) FILTER (WHERE group_id IS NOT NULL), '{}') AS groups
-- grouped:     FROM written
-- grouped:     WHERE cardinality($17::uuid[]) > 0
-- grouped: ),
enqueued AS (
    INSERT INTO pg_task (
        id, step, wakeup_at, queue, priority, key
        -- traced: , trace
        -- grouped: , group_id
    )
    SELECT
        id, step, coalesce(due_at, clock_timestamp() + make_interval(secs => coalesce(delay, 0))), queue, priority, key
        -- traced: , trace
        -- grouped: , ((SELECT groups FROM parents) ->> parent::text)::bigint
    FROM unnest($17::uuid[], $18::uuid[], $19::text[], $20::timestamptz[], $21::float8[], $22::text[], $23::smallint[],
        $24::text[]
        -- traced: , $25::text[]
        )
        AS new (
            parent, id, step, due_at, delay, queue, priority, key
            -- traced: , trace
        )
    WHERE (parent IN (SELECT id FROM written)) IS TRUE
    ON CONFLICT (key) WHERE key IS NOT NULL DO NOTHING
    RETURNING key
    -- grouped: , group_id
)
-- grouped: ,
-- grouped: kept AS MATERIALIZED (
-- grouped:     SELECT jsonb_object($26::uuid[]::text[], $27::text[]) AS results
-- grouped:     WHERE cardinality($26::uuid[]) > 0
-- grouped: ),
-- grouped: -- include: shared/results.sql
-- grouped: moved AS (
-- grouped:     SELECT group_id, 1 AS done, 0 AS added, 0 AS parked
-- grouped:     FROM done
-- grouped:     UNION ALL
-- grouped:     SELECT group_id, 0, 1, 0
-- grouped:     FROM enqueued
-- grouped:     UNION ALL
-- grouped:     SELECT group_id, 0, 0, 1
-- grouped:     FROM rescheduled
-- grouped:     WHERE error IS NOT NULL
-- grouped: ),
-- grouped: -- include: shared/counted.sql
-- include: shared/lost.sql
WHERE (SELECT count(*) FROM enqueued WHERE key IS NULL) = (
        SELECT count(*)
        FROM unnest($17::uuid[], $24::text[]) AS new (parent, key)
        WHERE key IS NULL
          AND (parent IN (SELECT id FROM written)) IS TRUE
    )
    OR format('a trigger, rule or row security policy of yours on pg_task keeps new tasks of %s out', $17[1])::boolean
