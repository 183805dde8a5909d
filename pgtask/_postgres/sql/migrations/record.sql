-- Record the applied version. Every role may read it: a worker reads it before anything else. A right that you revoke
-- later stays revoked.
DO $$
BEGIN
    IF to_regclass('pg_task_schema') IS NULL THEN
        CREATE TABLE pg_task_schema (
            version    integer     PRIMARY KEY,
            applied_at timestamptz NOT NULL DEFAULT now(),
            needs_code integer
        );
        GRANT SELECT ON pg_task_schema TO PUBLIC;
    END IF;
    IF NOT EXISTS (
        SELECT FROM pg_attribute
        WHERE attrelid = 'pg_task_schema'::regclass AND attname = 'needs_code' AND NOT attisdropped
    ) THEN
        ALTER TABLE pg_task_schema ADD COLUMN needs_code integer;
    END IF;
END
$$;

DO $$
DECLARE
    newest constant integer := current_setting('pgtask.version');
    added  bigint;
BEGIN
    INSERT INTO pg_task_schema (version, needs_code)
    SELECT version, least(version, current_setting('pgtask.needs_code')::integer)
    FROM generate_series(1, newest) AS version
    WHERE version NOT IN (SELECT applied.version FROM pg_task_schema AS applied);
    GET DIAGNOSTICS added = ROW_COUNT;
    IF added > 0 THEN
        RAISE INFO 'the schema is at version %', newest;
    END IF;
END
$$;
