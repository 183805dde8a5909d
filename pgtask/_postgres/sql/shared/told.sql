        -- Notify the workers of the queue of each row: the server sends equal notifications once. A payload as in 009,
        -- with a plus: it comes from a worker that gives tasks back, and not from one of many writers.
        pg_notify(
            'pg_task_changed',
            CASE
                WHEN octet_length(queue) < 4000 THEN format('%s+ %s', (SELECT to_regclass('pg_task')::oid), queue)
                ELSE ''
            END
        )::text AS told
