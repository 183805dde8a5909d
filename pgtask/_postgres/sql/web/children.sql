-- Find $2 of the runs that the run $1 has spawned, ended ones too.
--
-- Plan: pg_task_runs_parent_idx, in no order, so that a run with a million children is not sorted. Locks nothing.
SELECT id
FROM pg_task_runs
WHERE parent = $1
LIMIT $2
