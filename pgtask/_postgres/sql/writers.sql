-- The transactions that have written to pg_task, or are about to, and have not ended: each has a lock of the table until
-- its rows are visible. A prepared transaction keeps its lock and its name.
SELECT DISTINCT virtualtransaction
FROM pg_locks
WHERE locktype = 'relation'
  AND relation = to_regclass('pg_task')
  AND database = (SELECT oid FROM pg_database WHERE datname = current_database())
  AND mode = 'RowExclusiveLock'
