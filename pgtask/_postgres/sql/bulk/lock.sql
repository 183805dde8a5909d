-- Lock those of the tasks $1 that the filter $2 to $7 still chooses, to be cancelled; those under a live lease only if $8.
-- Returns each, and whether it is a run of a workflow. Passes over rows that another session has locked.
--
-- Plan: OFFSET 0 looks up each record of a run by the primary key, with any statistics.
SELECT
    id,
    EXISTS (SELECT FROM pg_task_runs WHERE pg_task_runs.id = pg_task.id OFFSET 0) OR pg_task_workflow(step) IS NOT NULL AS is_run
FROM pg_task
WHERE id = ANY ($1::uuid[])
-- include: shared/matching.sql
-- include: shared/cancellable.sql
ORDER BY id
FOR UPDATE SKIP LOCKED
