-- Tell every worker of this database, on every host, to finish its running steps and exit, as in pg_task. Not where
-- other schemas have a table and ours has none: the order is for none of these. Returns whether it was sent.
SELECT CASE
    WHEN to_regclass('pg_task') IS NOT NULL
        OR NOT EXISTS (SELECT FROM pg_class WHERE relname = 'pg_task' AND relkind = 'r')
    THEN pg_notify('pg_task_changed', 'stop_worker')::text IS NOT NULL
    ELSE false
END
