-- Prolong the leases of the tasks $1 under the tokens $2 to $3 seconds from now, as renew.sql does, and write the progress
-- $4 of their steps, as JSON (the text null: none).
--
-- A statement of its own, so that steps which report nothing pay nothing. Plan: as flush.sql says; the rows of `free` are
-- locked.
WITH free AS MATERIALIZED (
    SELECT id
    FROM pg_task
    -- include: shared/our_leases.sql
    FOR NO KEY UPDATE SKIP LOCKED
),
renewed AS (
    UPDATE pg_task AS task
    SET lock_expires_at = greatest(task.lock_expires_at, clock_timestamp() + make_interval(secs => $3)),
        progress = nullif(report.progress::jsonb, 'null')
    FROM unnest($1::uuid[], $2::uuid[], $4::text[]) AS report (id, token, progress)
    CROSS JOIN set_config('synchronous_commit', 'off', true)
    WHERE task.id = ANY (ARRAY[report.id])
      AND task.locked_by IS NOT DISTINCT FROM report.token
      AND report.id = ANY (ARRAY (SELECT id FROM free))
    RETURNING task.id
)
SELECT id, id IN (SELECT id FROM renewed)
FROM pg_task
    -- include: shared/our_leases.sql
