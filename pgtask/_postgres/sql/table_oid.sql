-- The oid of the table that notifications name.
SELECT to_regclass('pg_task')::oid
