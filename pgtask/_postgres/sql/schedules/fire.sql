-- Start the tasks $8 of the schedules named $7, and move the schedules: those named $1, which are at the time $2, go to the
-- next time $3, to be looked at from $4, with the last occurrence $5 (null: none), and the left out one $6 (null: none).
-- Returns how many tasks are new, and how many schedules it has moved.
--
-- A schedule that another worker has moved, or moves now, is left alone, with its tasks: so each occurrence is started
-- once. A task of that id is there only if a person has started the schedule in that second.
--
-- Lock order: the schedules, of which locked ones are skipped; then the new rows. Plan: all by primary key.
WITH wanted AS (
    SELECT *
    FROM unnest(
        $1::text[], $2::timestamptz[], $3::timestamptz[], $4::timestamptz[], $5::timestamptz[], $6::timestamptz[]
    ) AS one (name, was_at, next_at, look_at, last_at, skipped_at)
),
locked AS MATERIALIZED (
    SELECT s.name, s.step, s.workflow, s.queue, s.priority, w.next_at, w.look_at, w.last_at, w.skipped_at
    FROM pg_task_schedules AS s
    JOIN wanted AS w ON w.name = s.name
    WHERE s.next_at = w.was_at
      AND s.removed_at IS NULL
      AND (s.paused_at IS NULL OR w.last_at IS NULL)
    FOR NO KEY UPDATE OF s SKIP LOCKED
),
occurrence AS (
    SELECT one.id, locked.*
    FROM unnest($7::text[], $8::uuid[]) AS one (name, id)
    JOIN locked ON locked.name = one.name
),
inserted AS (
    INSERT INTO pg_task (id, step, queue, priority)
    SELECT id, step, queue, priority
    FROM occurrence
    ORDER BY id
    ON CONFLICT (id) DO NOTHING
    RETURNING id
),
recorded AS (
    INSERT INTO pg_task_runs (id, name)
    SELECT inserted.id, occurrence.workflow
    FROM inserted
    JOIN occurrence ON occurrence.id = inserted.id
    WHERE occurrence.workflow IS NOT NULL
),
moved AS (
    UPDATE pg_task_schedules AS s
    SET next_at = locked.next_at,
        look_at = locked.look_at,
        last_at = coalesce(locked.last_at, s.last_at),
        last_task = CASE
            WHEN locked.last_at IS NULL THEN s.last_task
            ELSE (SELECT max(id::text)::uuid FROM occurrence WHERE occurrence.name = s.name)
        END,
        skipped_at = coalesce(locked.skipped_at, s.skipped_at),
        error = NULL
    FROM locked
    WHERE s.name = locked.name
    RETURNING s.name
)
SELECT (SELECT count(*) FROM inserted), (SELECT count(*) FROM moved)
