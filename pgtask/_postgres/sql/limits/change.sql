-- Change the limit $1 in the name of $2: to $3 at once if $4, to $5 starts a second with the burst $6 if $7, to $8 units of
-- its cost a second with the burst $9 if $10, and to a pause of $11 seconds, or none, if $12. With $13, first take back what
-- people have changed before.
UPDATE pg_task_limits
SET concurrency = CASE WHEN $4 THEN $3::integer WHEN $13 THEN (declared ->> 'concurrency')::integer ELSE concurrency END,
    rate = CASE WHEN $7 THEN $5::float8 WHEN $13 THEN (declared ->> 'rate')::float8 ELSE rate END,
    burst = CASE WHEN $7 THEN $6::float8 WHEN $13 THEN (declared ->> 'burst')::float8 ELSE burst END,
    cost_rate = CASE WHEN $10 THEN $8::float8 WHEN $13 THEN (declared ->> 'cost_rate')::float8 ELSE cost_rate END,
    cost_burst = CASE WHEN $10 THEN $9::float8 WHEN $13 THEN (declared ->> 'cost_burst')::float8 ELSE cost_burst END,
    paused_until = CASE WHEN $12 THEN now() + make_interval(secs => $11::float8) ELSE paused_until END,
    changed = ARRAY (
        SELECT DISTINCT what
        FROM unnest(
            CASE WHEN $13 THEN '{}' ELSE changed END
            || CASE WHEN $4 THEN ARRAY['concurrency'] END
            || CASE WHEN $7 THEN ARRAY['rate'] END
            || CASE WHEN $10 THEN ARRAY['cost'] END
        ) AS what
        ORDER BY what
    ),
    changed_by = $2,
    updated_at = now()
WHERE name = $1
RETURNING name
