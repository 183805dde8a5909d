-- List the privileges that the role $1 (null: this one) lacks, of those on the tables $2 with the names $3; and whether
-- it may use the schema, and call its functions $4. Returns a row for each, as the GRANT that is missing.
WITH asked AS (
    SELECT coalesce($1::text, current_user) AS role, relnamespace::regnamespace::text AS home
    FROM pg_class
    WHERE oid = to_regclass('pg_task')
)
SELECT format('schema %s', home) AS what, format('GRANT USAGE ON SCHEMA %s TO %I', home, role) AS remedy
FROM asked
WHERE NOT has_schema_privilege(role::name, home::regnamespace, 'USAGE')
UNION ALL
SELECT
    format('table %s', name),
    format('GRANT %s ON %s.%s TO %I', string_agg(privilege, ', ' ORDER BY place), home, name, role)
FROM asked
CROSS JOIN unnest($2::text[], $3::text[]) WITH ORDINALITY AS needed (name, privilege, place)
WHERE NOT has_table_privilege(role::name, to_regclass(home || '.' || name), privilege)
GROUP BY home, name, role
UNION ALL
SELECT
    format('function %s', oid::regprocedure),
    format('GRANT EXECUTE ON FUNCTION %s TO %I', oid::regprocedure, role)
FROM asked
JOIN pg_proc ON pronamespace = home::regnamespace AND proname = ANY ($4::text[])
WHERE NOT has_function_privilege(role::name, pg_proc.oid, 'EXECUTE')
