-- Remembers what has been applied. Everybody may read it: a worker asks before it touches anything else.
CREATE TABLE IF NOT EXISTS pg_task_schema (
    version    integer     PRIMARY KEY,
    applied_at timestamptz NOT NULL DEFAULT now()
);

COMMENT ON TABLE pg_task_schema IS 'Versions of the schema of pgtask that have been applied here. Written by pgtask migrate.';
COMMENT ON COLUMN pg_task_schema.version IS 'A numbered migration; the greatest is the version of this schema.';
COMMENT ON COLUMN pg_task_schema.applied_at IS 'When it was applied.';

GRANT SELECT ON pg_task_schema TO PUBLIC;

DO $$
DECLARE
    newest constant integer := current_setting('pgtask.version');
    added  bigint;
BEGIN
    INSERT INTO pg_task_schema (version)
    SELECT generate_series(1, newest)
    ON CONFLICT DO NOTHING;
    GET DIAGNOSTICS added = ROW_COUNT;
    IF added > 0 THEN
        RAISE INFO 'the schema is at version %', newest;
    END IF;
END
$$;
