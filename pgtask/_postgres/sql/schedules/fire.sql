-- Start tasks of schedules, and move these: those named $1, which are at the time $2, go to the next time $3, to be looked
-- at from $4, with the last occurrence $5 (null: none) and the left out one $6 (null: none); $7 are the tasks of each, as
-- the text of an array. Returns how many tasks are new, and how many schedules it has moved.
--
-- A schedule that another worker has moved, or moves now, is left alone, with its tasks: so each occurrence is started
-- once. A task of that id is there only if a person has started the schedule in that second.
--
-- Lock order: the schedules, of which locked ones are skipped; then the new rows. Plan: all by primary key; no join of two
-- lists, which would be as long as the square of them.
WITH locked AS MATERIALIZED (
    SELECT s.name, s.step, s.workflow, s.queue, s.priority, w.next_at, w.look_at, w.last_at, w.skipped_at, w.tasks
    FROM unnest(
        $1::text[], $2::timestamptz[], $3::timestamptz[], $4::timestamptz[], $5::timestamptz[], $6::timestamptz[],
        $7::text[]
    ) AS w (name, was_at, next_at, look_at, last_at, skipped_at, tasks)
    JOIN pg_task_schedules AS s ON s.name = w.name
    WHERE s.next_at = w.was_at
      AND s.removed_at IS NULL
      AND (s.paused_at IS NULL OR w.last_at IS NULL)
    FOR NO KEY UPDATE OF s SKIP LOCKED
),
inserted AS (
    INSERT INTO pg_task (id, step, queue, priority)
    SELECT unnest(tasks::uuid[]), step, queue, priority
    FROM locked
    ON CONFLICT (id) DO NOTHING
    RETURNING id
),
recorded AS (
    INSERT INTO pg_task_runs (id, name)
    SELECT unnest(tasks::uuid[]), workflow
    FROM locked
    WHERE workflow IS NOT NULL
    ON CONFLICT (id) DO NOTHING
),
moved AS (
    UPDATE pg_task_schedules AS s
    SET next_at = locked.next_at,
        look_at = locked.look_at,
        last_at = coalesce(locked.last_at, s.last_at),
        last_task = coalesce((locked.tasks::uuid[])[cardinality(locked.tasks::uuid[])], s.last_task),
        skipped_at = coalesce(locked.skipped_at, s.skipped_at),
        error = NULL
    FROM locked
    WHERE s.name = locked.name
    RETURNING s.name
)
SELECT (SELECT count(*) FROM inserted), (SELECT count(*) FROM moved)
