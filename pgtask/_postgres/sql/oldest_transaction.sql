-- The transaction that has kept vacuum from removing dead rows of this database for longest: an open one, or a prepared
-- one that was forgotten. Sessions of other users show only to members of pg_read_all_stats.
SELECT pid, name, state, began_at
FROM (
    SELECT
        pid,
        coalesce(nullif(application_name, ''), backend_type) AS name,
        state,
        xact_start AS began_at
    FROM pg_stat_activity
    WHERE datname = current_database()
      AND pid <> pg_backend_pid()
      AND (backend_xid IS NOT NULL OR backend_xmin IS NOT NULL)
      AND backend_type <> 'autovacuum worker'
    UNION ALL
    SELECT NULL, gid, 'prepared', prepared
    FROM pg_prepared_xacts
    WHERE database = current_database()
) AS holder
WHERE began_at IS NOT NULL
ORDER BY began_at
LIMIT 1
