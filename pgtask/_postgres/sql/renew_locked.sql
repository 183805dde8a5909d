-- Prolong one lease to $3 seconds from now, of the task $1 under the token $2, whose row was locked when renew.sql
-- skipped it: wait for that lock for $4 milliseconds at most. The journal keeps the row of a run locked for most of the
-- time while the run records one thing after the other, but never for long. Returns the task if it was renewed; nothing
-- if the lease is not ours.
--
-- Plan: IS NOT DISTINCT FROM keeps the planner off the index of leases, so the primary key is left.
WITH patience AS MATERIALIZED (
    SELECT
        set_config('lock_timeout', $4::integer::text, true),
        set_config('synchronous_commit', 'off', true)
),
renewed AS (
    UPDATE pg_task AS task
    SET lock_expires_at = clock_timestamp() + make_interval(secs => $3)
    FROM patience
    WHERE task.id = $1::uuid
      AND task.locked_by IS NOT DISTINCT FROM $2::uuid
    RETURNING task.id
)
SELECT id
FROM renewed
