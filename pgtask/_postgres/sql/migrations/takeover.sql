-- Take the table over from the Rust crate pg_task: drop its indexes and triggers, unless pgtask.keep_pg_task is on.
--
-- The strongest lock comes first, so that no statement below waits while it holds a weaker one: readers wait only where
-- a table is adopted or repaired.
DO $$
DECLARE
    owner   name;
    name    name;
    theirs  name[];
    removed text[] := '{}';
BEGIN
    IF current_setting('pgtask.found') = 'nothing' THEN
        RETURN;
    END IF;
    SELECT rolname INTO owner
    FROM pg_class
    JOIN pg_roles ON pg_roles.oid = relowner
    WHERE pg_class.oid = 'pg_task'::regclass AND NOT pg_has_role(relowner, 'USAGE');
    IF FOUND THEN
        RAISE EXCEPTION 'the table pg_task belongs to the role %, and % may not change it; run as %: pgtask migrate',
            owner, current_user, owner
            USING ERRCODE = 'PGT01';
    END IF;

    theirs := ARRAY (
        SELECT tgname
        FROM pg_trigger
        WHERE tgrelid = 'pg_task'::regclass
          AND tgname IN (
              'pg_task_changed',
              'pg_task_changed_insert',
              'pg_task_changed_update',
              'pg_task_error_insert',
              'pg_task_error_update',
              'pg_task_before_update_refresh_updated_at_trigger'
          )
          AND NOT current_setting('pgtask.keep_pg_task')::boolean
        ORDER BY tgname
    );
    IF current_setting('pgtask.found') LIKE 'pgtask %'
        AND theirs = '{}'
        AND current_setting('pgtask.damage') !~ '"kind":"(index|constraint|default)"'
    THEN
        LOCK TABLE pg_task IN SHARE ROW EXCLUSIVE MODE;
    ELSE
        LOCK TABLE pg_task IN ACCESS EXCLUSIVE MODE;
    END IF;
    IF current_setting('pgtask.keep_pg_task')::boolean THEN
        RETURN;
    END IF;

    FOREACH name IN ARRAY theirs
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

    -- Not by CASCADE: a user may have a trigger of their own on one of them.
    FOR name IN
        SELECT proname
        FROM pg_proc
        WHERE pronamespace = quote_ident(current_schema())::regnamespace
          AND proname IN (
              'pg_task_notify_on_change', 'pg_task_notify_on_error', 'pg_task_before_update_refresh_updated_at'
          )
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
