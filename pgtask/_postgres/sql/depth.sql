-- How many tasks of each queue are in each state, see pgtask_depth in migrations/014_depth.sql.
SELECT queue, state, tasks, is_estimate, oldest_due
FROM pgtask_depth()
