-- The rows that were inserted into pg_task and deleted from it so far, as the statistics of Postgres have them, which may
-- be a second old; and the time of the server. No row on a standby, which counts nothing.
SELECT n_tup_ins AS inserted, n_tup_del AS deleted, extract(epoch FROM statement_timestamp())::float8 AS seen_at
FROM pg_stat_user_tables
WHERE relid = to_regclass('pg_task')
  AND NOT pg_is_in_recovery()
