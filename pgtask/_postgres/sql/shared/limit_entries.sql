-- The limits for which the tasks $1 wait: the keys $3 and the costs $4.
    FROM (
        SELECT id, limit_key, cost, coalesce(
            (SELECT is_strict FROM pg_task_limits WHERE name = split_part(limit_key, ' ', 1)), false
        ) AS is_strict
        FROM unnest($1::uuid[], $3::text[], $4::float8[]) AS entry (id, limit_key, cost)
    ) AS entry
