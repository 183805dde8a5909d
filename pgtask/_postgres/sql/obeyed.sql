-- What workers and consumers obey: the kind and the name of each thing that is paused, and the names of the limits.
SELECT kind, name
FROM pg_task_pauses
UNION ALL
SELECT 'limit', name
FROM pg_task_limits
