-- Look at the schedule $1 again in a minute: its task cannot be started, for the reason $2. Locks its row.
UPDATE pg_task_schedules
SET look_at = statement_timestamp() + interval '1 minute',
    error = $2
WHERE name = $1
  AND look_at <= statement_timestamp()
