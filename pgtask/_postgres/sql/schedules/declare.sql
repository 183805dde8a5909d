-- Declare the schedules of the app $1 whose names are $2, with their cron $3, zone $4, step $5, workflow $6, queue $7,
-- priority $8, missed $9, max_missed $10, overlap $11 and next time $12. Remove those of this app named $13. Returns the
-- names of those that are new or changed.
--
-- A schedule keeps its next time unless its expression or zone is another one, or it was removed. Another worker may do the
-- same at once: then the second one changes nothing. Lock order: the rows by name.
WITH wanted AS (
    SELECT *
    FROM unnest(
        $2::text[], $3::text[], $4::text[], $5::text[], $6::text[], $7::text[], $8::smallint[], $9::text[],
        $10::integer[], $11::text[], $12::timestamptz[]
    ) AS one (name, cron, zone, step, workflow, queue, priority, missed, max_missed, overlap, next_at)
),
removed AS (
    UPDATE pg_task_schedules
    SET removed_at = statement_timestamp()
    WHERE app = $1
      AND name = ANY ($13::text[])
      AND removed_at IS NULL
    RETURNING name
),
declared AS (
    INSERT INTO pg_task_schedules AS s (
        name, app, cron, zone, step, workflow, queue, priority, missed, max_missed, overlap, next_at, look_at, declared_at
    )
    SELECT
        name, $1, cron, zone, step, workflow, queue, priority, missed, max_missed, overlap, next_at, next_at,
        clock_timestamp()
    FROM wanted
    ORDER BY name
    ON CONFLICT (name) DO UPDATE
    SET app = excluded.app,
        cron = excluded.cron,
        zone = excluded.zone,
        step = excluded.step,
        workflow = excluded.workflow,
        queue = excluded.queue,
        priority = excluded.priority,
        missed = excluded.missed,
        max_missed = excluded.max_missed,
        overlap = excluded.overlap,
        next_at = CASE
            WHEN (s.cron, s.zone) = (excluded.cron, excluded.zone) AND s.removed_at IS NULL THEN s.next_at
            ELSE excluded.next_at
        END,
        look_at = CASE
            WHEN (s.cron, s.zone) = (excluded.cron, excluded.zone) AND s.removed_at IS NULL THEN s.next_at
            ELSE excluded.next_at
        END,
        error = NULL,
        removed_at = NULL,
        declared_at = excluded.declared_at
    WHERE (
        s.app, s.cron, s.zone, s.step, s.workflow, s.queue, s.priority, s.missed, s.max_missed, s.overlap, s.removed_at
    ) IS DISTINCT FROM (
        excluded.app, excluded.cron, excluded.zone, excluded.step, excluded.workflow, excluded.queue, excluded.priority,
        excluded.missed, excluded.max_missed, excluded.overlap, NULL::timestamptz
    )
    RETURNING name
)
SELECT name, false AS is_removed FROM declared
UNION ALL
SELECT name, true FROM removed
