-- List all that the migrations may have made, as it is now: the kind, the table, the name, the definition without the
-- name of the schema, and what is wrong with its state (null: nothing).
--
-- It reads the catalog. A thing that may have several forms has one here: the time in the argument of pg_task_notify,
-- the default of pg_task.id, and the constraint that pg_task 1.0 has made.
WITH home AS (
    SELECT relnamespace AS schema, relnamespace::regnamespace::text AS name
    FROM pg_class
    WHERE oid = to_regclass('pg_task')
),
ours AS (
    SELECT pg_class.oid, relname, relpersistence, home.name AS home
    FROM pg_class
    JOIN home ON relnamespace = home.schema
    WHERE relkind = 'r'
      AND relname ~ '^pg_task(_|$)'
),
attributes AS (
    SELECT ours.relname, attnum, attname, attnotnull, attidentity, format_type(atttypid, atttypmod) AS type, attrelid
    FROM pg_attribute
    JOIN ours ON ours.oid = attrelid
    WHERE attnum > 0
      AND NOT attisdropped
)
SELECT kind, on_table, name, definition, wrong
FROM (
    SELECT
        'table' AS kind,
        relname::text AS on_table,
        relname::text AS name,
        CASE relpersistence WHEN 'p' THEN 'logged' ELSE 'unlogged' END AS definition,
        NULL AS wrong
    FROM ours
    UNION ALL
    SELECT
        'column',
        relname,
        attname,
        concat_ws(
            ' ',
            type,
            CASE WHEN attnotnull THEN 'NOT NULL' END,
            CASE WHEN attidentity <> '' THEN 'GENERATED AS IDENTITY' END
        ),
        NULL
    FROM attributes
    UNION ALL
    SELECT
        'default',
        attributes.relname,
        attname,
        CASE pg_get_expr(adbin, adrelid)
            WHEN 'uuidv7()' THEN 'a random id'
            WHEN 'gen_random_uuid()' THEN 'a random id'
            ELSE pg_get_expr(adbin, adrelid)
        END,
        NULL
    FROM attributes
    JOIN pg_attrdef ON adrelid = attrelid AND adnum = attnum
    UNION ALL
    SELECT
        'index',
        ours.relname,
        made.relname,
        replace(pg_get_indexdef(indexrelid), home || '.', ''),
        CASE WHEN NOT indisvalid THEN 'is not valid' END
    FROM pg_index
    JOIN ours ON ours.oid = indrelid
    JOIN pg_class AS made ON made.oid = indexrelid
    WHERE NOT EXISTS (SELECT FROM pg_constraint WHERE conindid = indexrelid)
    UNION ALL
    SELECT
        'constraint',
        ours.relname,
        conname,
        CASE pg_get_constraintdef(pg_constraint.oid)
            WHEN 'CHECK ((((locked_by IS NULL) AND (lock_expires_at IS NULL)) OR '
                '((locked_by IS NOT NULL) AND (lock_expires_at IS NOT NULL))))'
            THEN 'CHECK (((locked_by IS NULL) = (lock_expires_at IS NULL)))'
            ELSE replace(regexp_replace(pg_get_constraintdef(pg_constraint.oid), ' NOT VALID$', ''), home || '.', '')
        END,
        CASE WHEN NOT convalidated THEN 'is not validated' END
    FROM pg_constraint
    JOIN ours ON ours.oid = conrelid
    WHERE contype <> 'n'
    UNION ALL
    SELECT
        'trigger',
        ours.relname,
        tgname,
        regexp_replace(
            replace(pg_get_triggerdef(pg_trigger.oid), home || '.', ''), 'pg_task_notify\(.*\)$', 'pg_task_notify()'
        ),
        CASE WHEN tgenabled NOT IN ('O', 'A') THEN 'is disabled' END
    FROM pg_trigger
    JOIN ours ON ours.oid = tgrelid
    WHERE NOT tgisinternal
    UNION ALL
    SELECT
        'function',
        'pg_task',
        format('%s(%s)', proname, pg_get_function_identity_arguments(pg_proc.oid)),
        concat_ws(
            ' ',
            'RETURNS',
            pg_get_function_result(pg_proc.oid),
            'LANGUAGE',
            lanname,
            CASE provolatile WHEN 'i' THEN 'IMMUTABLE' WHEN 's' THEN 'STABLE' ELSE 'VOLATILE' END,
            CASE WHEN prosecdef THEN 'SECURITY DEFINER' END,
            replace(array_to_string(proconfig, ' '), home.name || ',', 'HOME,'),
            'MD5',
            md5(prosrc)
        ),
        NULL
    FROM pg_proc
    JOIN home ON pronamespace = home.schema
    JOIN pg_language ON pg_language.oid = prolang
    WHERE proname ~ '^(pg_task|pgtask)_'
    UNION ALL
    SELECT
        'comment',
        ours.relname,
        concat_ws('.', ours.relname, attname),
        description,
        NULL
    FROM pg_description
    JOIN ours ON ours.oid = objoid AND classoid = 'pg_class'::regclass
    LEFT JOIN attributes ON attrelid = objoid AND attnum = objsubid
    UNION ALL
    SELECT
        'comment',
        'pg_task',
        proname || '()',
        description,
        NULL
    FROM pg_description
    JOIN pg_proc ON pg_proc.oid = objoid AND classoid = 'pg_proc'::regclass
    JOIN home ON pronamespace = home.schema
    WHERE proname ~ '^(pg_task|pgtask)_'
) AS found
ORDER BY
    array_position('{table,column,default,function,trigger,index,constraint,comment}'::text[], kind),
    on_table,
    name
