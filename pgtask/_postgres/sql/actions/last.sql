-- List the last $1 actions, the latest first.
--
-- Plan: the primary key, backwards.
SELECT id, began_at, ended_at, done_by, action, filter, tasks, state, now() AS seen_at
FROM pg_task_actions
ORDER BY id DESC
LIMIT $1
