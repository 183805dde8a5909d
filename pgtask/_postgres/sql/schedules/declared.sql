-- Read the schedules of the app $1, and those of other apps with one of the names $2: what is declared, whether it is
-- removed, its app and its last time. Each row ends with the time now; there is one in any case, of which the rest is null.
--
-- One statement for the start of a worker; it reads the whole table, which has a row for each schedule.
SELECT
    name, cron, zone, step, workflow, queue, priority, missed, max_missed, overlap,
    removed_at IS NOT NULL, app, last_at, statement_timestamp()
FROM (SELECT) AS always
LEFT JOIN pg_task_schedules ON app = $1 OR name = ANY ($2::text[])
