-- Find out what exists, and whether we may change it. Reads the catalog only; refuses with SQLSTATE PGT01 and one line.
--
-- Needs the settings pgtask.version and pgtask.keep_pg_task; leaves two more, all local to the transaction:
--   search_path    the schema of the table that an unqualified pg_task means, else the first schema of the path
--   pgtask.found   'nothing', 'pg_task 0.2', 'pg_task 1.0', or 'pgtask <version>'
DO $$
DECLARE
    newest   constant integer  := current_setting('pgtask.version');
    here     constant regclass := to_regclass('pg_task');
    home     text;
    applied  integer;
    complete boolean;
    old      boolean;
    wrong    text;
BEGIN
    IF current_setting('server_version_num')::integer < 140000 THEN
        RAISE EXCEPTION 'pgtask needs PostgreSQL 14 or newer; this server is %', current_setting('server_version')
            USING ERRCODE = 'PGT01';
    END IF;

    SELECT coalesce(
        (SELECT relnamespace::regnamespace::text FROM pg_class WHERE oid = here),
        quote_ident(current_schema())
    ) INTO home;
    IF home IS NULL THEN
        RAISE EXCEPTION 'no schema of the search_path (%) exists, so there is no place for the table pg_task',
            current_setting('search_path')
            USING ERRCODE = 'PGT01';
    END IF;
    PERFORM set_config('search_path', home, true);

    IF to_regclass('pg_task_schema') IS NOT NULL THEN
        SELECT max(version) INTO applied FROM pg_task_schema;
    END IF;
    IF here IS NOT NULL AND applied > newest THEN
        RAISE EXCEPTION 'the schema of pg_task is at version %, this pgtask knows only %; run: pip install --upgrade pgtask-supervisor',
            applied, newest
            USING ERRCODE = 'PGT01';
    END IF;

    IF here IS NULL THEN
        PERFORM set_config('pgtask.found', 'nothing', true);
        RETURN;
    END IF;

    old := EXISTS (
        SELECT FROM pg_attribute
        WHERE attrelid = here AND attname = 'is_running' AND NOT attisdropped
    );
    SELECT
        string_agg(
            CASE
                WHEN have.attname IS NULL THEN format('column %s is missing', want.name)
                ELSE format('column %s is %s, not %s', want.name, format_type(have.atttypid, NULL), want.type)
            END,
            ', ' ORDER BY want.place
        ) FILTER (
            WHERE CASE
                WHEN have.attname IS NULL THEN want.required
                ELSE format_type(have.atttypid, NULL) <> want.type
            END
        ),
        bool_and(have.attname IS NOT NULL) FILTER (WHERE want.name <> 'is_running')
    INTO wrong, complete
    FROM (VALUES
        (1,  'id',              'uuid',                     true),
        (2,  'step',            'text',                     true),
        (3,  'wakeup_at',       'timestamp with time zone', true),
        (4,  'tried',           'integer',                  true),
        (5,  'error',           'text',                     true),
        (6,  'created_at',      'timestamp with time zone', true),
        (7,  'updated_at',      'timestamp with time zone', true),
        (8,  'is_running',      'boolean',                  false),
        (9,  'locked_by',       'uuid',                     NOT old),
        (10, 'lock_expires_at', 'timestamp with time zone', NOT old),
        (11, 'queue',           'text',                     false),
        (12, 'priority',        'smallint',                 false),
        (13, 'key',             'text',                     false),
        (14, 'claims',          'integer',                  false)
    ) AS want (place, name, type, required)
    LEFT JOIN pg_attribute AS have
        ON have.attrelid = here
        AND have.attname = want.name
        AND have.attnum > 0
        AND NOT have.attisdropped;

    IF (SELECT relkind FROM pg_class WHERE oid = here) <> 'r' THEN
        wrong := 'it is no ordinary table';
    ELSIF wrong IS NULL AND NOT EXISTS (
        SELECT FROM pg_index AS index
        JOIN pg_attribute AS have ON have.attrelid = here AND have.attnum = index.indkey[0]
        WHERE index.indrelid = here AND index.indisprimary AND index.indnkeyatts = 1 AND have.attname = 'id'
    ) THEN
        wrong := 'id is not its primary key';
    END IF;
    IF wrong IS NOT NULL THEN
        RAISE EXCEPTION '%.pg_task is a table of another program (%); give pgtask another database or search_path',
            home, wrong
            USING ERRCODE = 'PGT01';
    END IF;

    IF old AND current_setting('pgtask.keep_pg_task')::boolean THEN
        RAISE EXCEPTION 'this pg_task table is of pg_task 0.2, whose workers know no leases and cannot share it; '
            'upgrade them to 1.0 first, or run: pgtask migrate without --keep-pg-task'
            USING ERRCODE = 'PGT01';
    END IF;

    PERFORM set_config(
        'pgtask.found',
        CASE
            WHEN old THEN 'pg_task 0.2'
            WHEN complete AND applied IS NOT NULL THEN 'pgtask ' || applied
            ELSE 'pg_task 1.0'
        END,
        true
    );
END
$$;
