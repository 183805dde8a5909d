-- Takes the table over from the Rust crate pg_task: its indexes and triggers go, unless pgtask.keep_pg_task is on.
--
-- The strongest lock comes first, so that nothing below waits while it holds a weaker one. pg_task_error_insert and
-- pg_task_error_update stay in any case: they tell people (LISTEN pg_task_error) that a task was parked, fire for that
-- alone, and we have nothing in their place.
DO $$
DECLARE
    name    name;
    removed text[] := '{}';
BEGIN
    IF current_setting('pgtask.found') = 'nothing' THEN
        RETURN;
    END IF;
    LOCK TABLE pg_task IN ACCESS EXCLUSIVE MODE;
    IF current_setting('pgtask.keep_pg_task')::boolean THEN
        RETURN;
    END IF;

    FOR name IN
        SELECT tgname
        FROM pg_trigger
        WHERE tgrelid = 'pg_task'::regclass
          AND tgname IN (
              'pg_task_changed',
              'pg_task_changed_insert',
              'pg_task_changed_update',
              'pg_task_before_update_refresh_updated_at_trigger'
          )
        ORDER BY tgname
    LOOP
        EXECUTE format('DROP TRIGGER %I ON pg_task', name);
        removed := removed || name::text;
    END LOOP;

    FOR name IN
        SELECT relname
        FROM pg_index
        JOIN pg_class ON pg_class.oid = indexrelid
        WHERE indrelid = 'pg_task'::regclass
          AND relname IN ('pg_task_wakeup_at_idx', 'pg_task_locked_by_idx', 'pg_task_next_available_at_idx')
        ORDER BY relname
    LOOP
        EXECUTE format('DROP INDEX %I', name);
        removed := removed || name::text;
    END LOOP;

    -- Not by CASCADE: somebody may have hung a trigger of his own on one of them.
    FOR name IN
        SELECT proname
        FROM pg_proc
        WHERE pronamespace = current_schema()::regnamespace
          AND proname IN ('pg_task_notify_on_change', 'pg_task_before_update_refresh_updated_at')
          AND pronargs = 0
          AND NOT EXISTS (SELECT FROM pg_trigger WHERE tgfoid = pg_proc.oid)
        ORDER BY proname
    LOOP
        EXECUTE format('DROP FUNCTION %I()', name);
    END LOOP;

    IF removed <> '{}' THEN
        RAISE INFO 'removed the indexes and triggers of pg_task: %', array_to_string(removed, ', ');
    END IF;
END
$$;
