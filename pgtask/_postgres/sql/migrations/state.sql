-- Find out whether there is anything to do. One statement for the boot of every worker, without a lock that blocks
-- others. Fails with 42P01 where there is no schema of pgtask; then inspect.sql has the details.
SELECT
    max(version) AS version,
    max(coalesce((to_jsonb(pg_task_schema) ->> 'needs_code')::integer, version)) AS needs_code,
    13 = (
        SELECT count(*)
        FROM pg_attribute
        WHERE attrelid = to_regclass('pg_task')
          AND NOT attisdropped
          AND attname IN (
              'id', 'step', 'wakeup_at', 'tried', 'error', 'created_at', 'updated_at', 'locked_by', 'lock_expires_at',
              'queue', 'priority', 'key', 'claims'
          )
    ) AS complete,
    EXISTS (
        SELECT
        FROM pg_trigger
        WHERE tgrelid = to_regclass('pg_task')
          AND (
              tgfoid = to_regproc('pg_task_notify_on_change')
              OR (tgname = 'pg_task_inserted' AND encode(tgargs, 'escape') LIKE 'infinity%')
          )
    ) AS kept
FROM pg_task_schema
