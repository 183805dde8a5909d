-- List the sessions that block a migration: they have locked the table, or run another migration.
SELECT string_agg(
    format('pid %s (%s, %s)', pid, coalesce(nullif(application_name, ''), 'unnamed'), coalesce(state, 'state unknown')),
    ', '
)
FROM (
    SELECT DISTINCT pid, application_name, state
    FROM pg_locks
    JOIN pg_stat_activity USING (pid)
    WHERE granted
      AND pid <> pg_backend_pid()
      AND (
          (locktype = 'relation' AND relation = to_regclass('pg_task'))
          OR (locktype = 'advisory' AND classid = 1885828193 AND objid = 1 AND objsubid = 2)
      )
      AND pg_locks.database = (SELECT oid FROM pg_database WHERE datname = current_database())
    ORDER BY pid
    LIMIT 5
) AS holder
