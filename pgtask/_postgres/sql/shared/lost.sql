-- The answer of each flush: of each kind the ids that it has found, null for all; and tell idle workers if $16.
SELECT
    CASE WHEN (SELECT count(*) FROM done) < cardinality($1::uuid[]) THEN ARRAY (SELECT id FROM done) END,
    CASE WHEN (SELECT count(*) FROM continued) < cardinality($3::uuid[]) THEN ARRAY (SELECT id FROM continued) END,
    CASE WHEN (SELECT count(*) FROM rescheduled) < cardinality($7::uuid[]) THEN ARRAY (SELECT id FROM rescheduled) END,
    CASE WHEN $16 THEN pg_notify('pg_task_changed', '')::text END
    -- grouped: , ARRAY (SELECT group_id FROM counted)
