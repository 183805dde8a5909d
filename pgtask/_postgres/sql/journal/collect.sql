-- Read the ends of the runs $1: whether it is left for another time, state (null: not ended), output and error. Their tasks
-- decide: plain SQL may have parked, revived or removed one. A run without a record counts as ended, as it will notify no
-- parent.
--
-- Sends 16 MB of outputs and errors at most, and the run that exceeds this. Those behind it are left.
SELECT
    id,
    sent - size >= 16777216,
    state,
    CASE WHEN sent - size < 16777216 THEN output END,
    CASE WHEN sent - size < 16777216 THEN error END
FROM (
    SELECT *, sum(size) OVER (ROWS UNBOUNDED PRECEDING) AS sent
    FROM (
        SELECT
            requested.id,
            CASE
                WHEN task.error IS NOT NULL THEN 'ERROR'
                WHEN run.id IS NOT NULL AND task.id IS NOT NULL THEN NULL
                WHEN run.state = 'SUCCESS' THEN 'SUCCESS'
                ELSE 'CANCELLED'
            END AS state,
            run.output,
            coalesce(task.error, run.error) AS error,
            coalesce(octet_length(run.output), 0) + coalesce(octet_length(coalesce(task.error, run.error)), 0) AS size
        FROM unnest($1::uuid[]) AS requested (id)
        LEFT JOIN LATERAL (
            SELECT id, state, output, error FROM pg_task_runs WHERE id BETWEEN requested.id AND requested.id ORDER BY id LIMIT 1
        ) AS run ON true
        LEFT JOIN LATERAL (SELECT id, error FROM pg_task WHERE id = requested.id OFFSET 0) AS task ON true
    ) AS seen
) AS ended
