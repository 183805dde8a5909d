-- The parents that wait for the runs of `ended` (id, and parent if that waits). A parent that is paused is due now; under
-- a lease its wakeup_at changes, so that it is not suspended. Plan: joined by arrays of one id, as flush.sql says.
parent AS (
    UPDATE pg_task_runs AS run
    SET waits_for = waits_for - child.ended
    FROM (SELECT parent, count(*)::integer AS ended FROM ended WHERE parent IS NOT NULL GROUP BY parent) AS child
    WHERE run.id = ANY (ARRAY[child.parent])
    RETURNING run.id, run.waits_for, run.paused_until
),
woken_parent AS (
    UPDATE pg_task AS task
    SET wakeup_at = CASE
        WHEN task.locked_by IS NULL THEN least(task.wakeup_at, now())
        ELSE greatest(clock_timestamp(), task.wakeup_at + interval '1 microsecond')
    END
    FROM parent
    WHERE task.id = ANY (ARRAY[parent.id])
      AND parent.waits_for <= 0
      AND (task.locked_by IS NOT NULL OR task.wakeup_at = parent.paused_until)
),
-- The callers that wait for their results.
notified AS MATERIALIZED (
    SELECT pg_notify('pg_task_ended', string_agg(id::text, ','))
    FROM (SELECT id, row_number() OVER () / 200 AS part FROM ended) AS numbered
    GROUP BY part
)
