-- For the rest of this transaction, read tables by their indexes, with any statistics: an operator's question must
-- not become a scan of the whole table. As statements, not settings of the session: they pass through pgbouncer.
SELECT
    set_config('enable_seqscan', 'off', true),
    set_config('enable_bitmapscan', 'off', true),
    set_config('enable_sort', 'off', true),
    set_config('jit', 'off', true),
    set_config('statement_timeout', '30s', true),
    set_config('lock_timeout', '5s', true),
    now()
