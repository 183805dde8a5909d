-- The size of the table, from the catalogue and the statistics alone: no row is counted. `rows` is the planner's
-- estimate, null before the first vacuum or analyze.
SELECT
    CASE WHEN reltuples >= 0 THEN reltuples::bigint END AS rows,
    coalesce(n_dead_tup, 0) AS dead_rows,
    pg_table_size(pg_class.oid) AS table_bytes,
    pg_indexes_size(pg_class.oid) AS index_bytes,
    greatest(last_vacuum, last_autovacuum) AS vacuumed_at,
    now() AS seen_at
FROM pg_class
LEFT JOIN pg_stat_all_tables ON relid = pg_class.oid
WHERE pg_class.oid = to_regclass('pg_task')
