-- List the schedules: all columns, the state of the task of the last occurrence, and the time now. Reads the whole table.
SELECT
    s.name, s.app, s.cron, s.zone, s.step, s.workflow, s.queue, s.priority, s.missed, s.max_missed, s.overlap, s.next_at,
    s.last_at, s.last_task, s.skipped_at, s.error, s.paused_at, s.paused_by, s.removed_at,
    CASE
        WHEN t.id IS NULL THEN CASE WHEN s.last_task IS NOT NULL THEN 'ended' END
        WHEN t.error IS NOT NULL THEN 'parked'
        WHEN t.locked_by IS NOT NULL THEN 'running'
        ELSE 'waiting'
    END,
    statement_timestamp()
FROM pg_task_schedules AS s
LEFT JOIN pg_task AS t ON t.id = s.last_task
ORDER BY s.removed_at IS NOT NULL, s.next_at, s.name
