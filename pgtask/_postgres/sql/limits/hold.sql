-- Lock those of the keys of limits $1 that a turn may run steps of, until the end of its transaction. Returns what
-- pg_task_hold_limits (022) says of each.
SELECT pg_task_hold_limits($1)
