-- Suspend runs that wait: $1 under the tokens $2, whose wakeup_at was $3 when they last looked. They fall due at $4 (null:
-- never), have tried $5 times, and wait for $6. $7 and $8: the children that they wait for, as pairs of run and child; $9
-- the count of these of each run, and $10 whether the end of one is enough.
--
-- A run is not suspended if something has come since it looked: its wakeup_at has changed, or too many of the children have
-- ended. Returns for each run that is held: whether it is suspended, and its wakeup_at. A run is paused for as long as its
-- wakeup_at equals paused_until: only then does a signal or the end of a child wake it.
--
-- A child has ended if collect.sql says so. A record that contradicts its task is corrected.
--
-- Lock order: the tasks of the runs, their records, the records of the children. Waits for no lock: a run whose task or
-- record another session has locked is not held this time. A child whose record is locked may end without waking the run,
-- so the others must be enough; where they are not, the run is not held this time.
--
-- Plan: by the primary keys, independent of statistics, as end.sql.
WITH fenced AS MATERIALIZED (
    SELECT entry.*, task.wakeup_at
    FROM unnest(
        $1::uuid[], $2::uuid[], $3::timestamptz[], $4::timestamptz[], $5::integer[], $6::text[], $9::integer[], $10::boolean[]
    ) AS entry (run, token, seen_at, due_at, tried, waits_on, children, any_child)
    -- include: shared/fence.sql
),
own_record AS MATERIALIZED (
    SELECT id
    FROM pg_task_runs
    WHERE id = ANY (ARRAY (SELECT run FROM fenced))
    ORDER BY id
    FOR NO KEY UPDATE SKIP LOCKED
),
live AS MATERIALIZED (
    SELECT pair.run, pair.child, seen.state, seen.ended_at
    FROM unnest($7::uuid[], $8::uuid[]) AS pair (run, child)
    CROSS JOIN LATERAL (
        SELECT state, ended_at FROM pg_task_runs WHERE id BETWEEN pair.child AND pair.child ORDER BY id LIMIT 1
    ) AS seen
    CROSS JOIN LATERAL (SELECT FROM pg_task WHERE id = pair.child AND error IS NULL OFFSET 0) AS task
    WHERE pair.run = ANY (ARRAY (SELECT run FROM fenced))
),
-- A child that has ended since this statement began has another record than this statement has seen.
child AS MATERIALIZED (
    SELECT
        live.run,
        live.child,
        record.id IS NULL AS is_skipped,
        record.state IS NOT DISTINCT FROM live.state AND record.ended_at IS NOT DISTINCT FROM live.ended_at AS is_live
    FROM live
    LEFT JOIN LATERAL (
        SELECT id, state, ended_at
        FROM pg_task_runs
        WHERE id BETWEEN live.child AND live.child
        ORDER BY id
        LIMIT 1
        FOR NO KEY UPDATE SKIP LOCKED
    ) AS record ON true
),
remaining AS MATERIALIZED (
    SELECT
        run,
        count(*) FILTER (WHERE is_live AND NOT is_skipped)::integer AS children,
        bool_or(is_skipped) AS is_unsure
    FROM child
    GROUP BY run
),
looked AS MATERIALIZED (
    SELECT
        *,
        coalesce(wakeup_at = seen_at, false) AS is_unchanged,
        children = 0 OR remaining >= CASE WHEN any_child THEN children ELSE 1 END AS must_wait
    FROM (
        SELECT
            fenced.*,
            coalesce((ARRAY (SELECT children FROM remaining))[at], 0) AS remaining,
            coalesce((ARRAY (SELECT is_unsure FROM remaining))[at], false) AS is_unsure
        FROM fenced
        CROSS JOIN LATERAL (SELECT array_position(ARRAY (SELECT run FROM remaining), fenced.run) AS at OFFSET 0) AS place
    ) AS counted
),
decided AS MATERIALIZED (
    SELECT *, is_unchanged AND must_wait AS is_suspended, run = ANY (ARRAY (SELECT id FROM own_record)) AS has_record
    FROM looked
    WHERE (must_wait OR NOT is_unsure OR NOT is_unchanged)
      AND (
          run = ANY (ARRAY (SELECT id FROM own_record))
          OR (SELECT id FROM pg_task_runs AS seen WHERE seen.id BETWEEN looked.run AND looked.run ORDER BY id LIMIT 1) IS NULL
      )
),
paused AS (
    UPDATE pg_task AS task
    SET wakeup_at = coalesce(($4::timestamptz[])[array_position($1::uuid[], task.id)], 'infinity'),
        tried = ($5::integer[])[array_position($1::uuid[], task.id)],
        locked_by = NULL,
        lock_expires_at = NULL,
        claims = 0,
        updated_at = now()
    WHERE task.id = ANY (ARRAY (SELECT run FROM decided WHERE is_suspended))
),
-- What the records say from now on. A run and the child that it waits for may be suspended together: one row for both.
record AS (
    SELECT
        id,
        bool_or(is_child) AS is_child,
        max(waits_on) AS waits_on,
        max(paused_until) AS paused_until,
        coalesce(max(waits_for), 0) AS waits_for
    FROM (
        SELECT
            run AS id,
            false AS is_child,
            waits_on,
            coalesce(due_at, 'infinity') AS paused_until,
            CASE WHEN any_child THEN least(1, remaining) ELSE remaining END AS waits_for
        FROM decided
        WHERE is_suspended
          AND has_record
        UNION ALL
        SELECT child, true, NULL, NULL, NULL
        FROM child
        WHERE is_live
          AND NOT is_skipped
          AND run = ANY (ARRAY (SELECT run FROM decided WHERE is_suspended))
    ) AS own_or_child
    GROUP BY id
),
noted AS (
    INSERT INTO pg_task_runs AS run (id, name, awaited, waits_on, paused_until, waits_for)
    SELECT id, '', is_child, waits_on, paused_until, waits_for
    FROM record
    ON CONFLICT (id) DO UPDATE
    SET awaited = run.awaited OR excluded.awaited,
        state = NULL,
        error = NULL,
        ended_at = NULL,
        waits_on = coalesce(excluded.waits_on, run.waits_on),
        paused_until = coalesce(excluded.paused_until, run.paused_until),
        waits_for = CASE WHEN excluded.paused_until IS NULL THEN run.waits_for ELSE excluded.waits_for END
)
SELECT run, is_suspended, wakeup_at
FROM decided
