-- What is paused: kind, name, reason, since when, by whom; and the time now. A row of the kind 'groups' says that there are
-- groups of tasks that have not ended.
SELECT kind, name, reason, paused_at, paused_by, now()
FROM pg_task_pauses
UNION ALL
SELECT 'groups', '', NULL, now(), '', now()
WHERE EXISTS (SELECT FROM pg_task_groups WHERE ended_at IS NULL)
ORDER BY 1, 2
