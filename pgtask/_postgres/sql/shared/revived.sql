-- Revive the records of those tasks of the CTE `changed` that are runs and had failed, as pg_task_run_revived() does for a
-- change by hand.
--
-- Plan: an array leaves the planner no other way than the primary key.
revived AS (
    UPDATE pg_task_runs
    SET state = NULL,
        error = NULL,
        ended_at = NULL
    WHERE id = ANY (ARRAY (SELECT id FROM changed))
      AND state = 'ERROR'
)
