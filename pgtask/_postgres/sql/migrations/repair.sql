-- Make the objects again that damage.sql has found missing and the migrations cannot make, since their table exists;
-- and report them. Needs the setting pgtask.damage.
DO $$
DECLARE
    lost     record;
    owner    name;
    repaired text[] := '{}';
BEGIN
    SELECT rolname INTO owner FROM pg_class JOIN pg_roles ON pg_roles.oid = relowner WHERE pg_class.oid = 'pg_task'::regclass;
    FOR lost IN
        SELECT *
        FROM json_to_recordset(current_setting('pgtask.damage')::json)
            AS lost (kind text, on_table text, name text, definition text, label text)
    LOOP
        IF lost.kind = 'default' THEN
            EXECUTE format('ALTER TABLE %I ALTER COLUMN %I SET DEFAULT %s', lost.on_table, lost.name, lost.definition);
        ELSIF lost.kind = 'constraint' THEN
            EXECUTE format('ALTER TABLE %I DROP CONSTRAINT IF EXISTS %I', lost.on_table, lost.name);
            EXECUTE format('ALTER TABLE %I ADD CONSTRAINT %I %s', lost.on_table, lost.name, lost.definition);
        ELSIF lost.kind = 'function' AND lost.definition NOT IN ('', 'search_path') THEN
            EXECUTE format('ALTER FUNCTION %s OWNER TO %I', lost.name, owner);
        END IF;
        repaired := repaired || lost.label;
    END LOOP;
    IF repaired <> '{}' THEN
        RAISE INFO 'repaired: %', array_to_string(repaired, ', ');
    END IF;
END
$$;
