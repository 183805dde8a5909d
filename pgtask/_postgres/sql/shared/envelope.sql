-- The beginning of the step of a task, which a pattern of foreign.py is compared with; and after a byte that JSON cannot
-- contain, the key. Without a key there is nothing to copy.
CASE WHEN key IS NULL THEN left(step, 2000) ELSE left(step, 2000) || E'\x01' || key END
