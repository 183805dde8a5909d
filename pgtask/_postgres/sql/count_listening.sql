-- Count the workers of this database that listen for notifications, as far as this role can see: ours by the names of
-- their connections, others by their last query, which only a session of the same role shows.
SELECT count(*)
FROM pg_stat_activity
WHERE datname = current_database()
  AND (application_name ~ '^pgtask worker .* listen$' OR query ~* '^\s*LISTEN\s+"?pg_task_changed"?')
