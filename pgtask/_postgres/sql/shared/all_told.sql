-- The number of the tasks of the CTE `changed`. Tells idle workers once, unless the session is not to notify (009).
SELECT
    count(*),
    CASE
        WHEN count(*) > 0 AND coalesce(current_setting('pgtask.notify', true), '') NOT IN ('off', 'false', 'no', '0')
            THEN pg_notify('pg_task_changed', '')::text
    END
FROM changed
