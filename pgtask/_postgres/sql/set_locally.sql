-- Give the settings $1 the values $2 for the rest of this transaction. Returns their names and the values before.
WITH setting AS MATERIALIZED (
    SELECT name, value, current_setting(name) AS before
    FROM unnest($1::text[], $2::text[]) AS wanted (name, value)
)
SELECT name, before, set_config(name, value, true)
FROM setting
