-- Is there anything to do? One statement for the boot of every worker: no lock that anybody waits for.
-- Fails with 42P01 where pgtask has never been; then look.sql tells more.
SELECT
    max(version) AS version,
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
          AND tgfoid = to_regproc('pg_task_notify_on_change')
    ) AS kept
FROM pg_task_schema
