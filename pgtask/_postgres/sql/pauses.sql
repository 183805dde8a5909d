-- What is paused: kind, name, reason, since when, by whom; and the time now.
SELECT kind, name, reason, paused_at, paused_by, now()
FROM pg_task_pauses
ORDER BY kind, name
