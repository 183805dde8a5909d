-- For the rest of this transaction, read tables by their indexes, with any statistics: an operator's question must
-- not become a scan of the whole table. As statements, not settings of the session: they pass through pgbouncer. A
-- session that has a shorter statement_timeout keeps it.
SELECT
    set_config('enable_seqscan', 'off', true),
    set_config('enable_bitmapscan', 'off', true),
    set_config('enable_sort', 'off', true),
    set_config('jit', 'off', true),
    set_config(
        'statement_timeout',
        CASE
            WHEN current_setting('statement_timeout')::interval BETWEEN '1 ms' AND '30 s' THEN current_setting('statement_timeout')
            ELSE '30s'
        END,
        true
    ),
    set_config('lock_timeout', '5s', true),
    now()
