-- Find the schedules of the app $1 whose time has come, the $2 that have waited longest at most. Each row begins with the time now and the
-- time of the next look, which is null if there is none; the rest is null in the only row if none is due.
--
-- Of those that fall due together each worker takes others first, by its random number $3.
--
-- Plan: the index of what to look at, sorted further within one time; the tasks by their primary key. statement_timestamp() does not change within the
-- statement, so that the index is searched by it.
WITH due AS (
    SELECT *
    FROM pg_task_schedules
    WHERE app = $1
      AND removed_at IS NULL
      AND look_at <= statement_timestamp()
    ORDER BY look_at, hashtextextended(name, $3::bigint)
    LIMIT $2
)
SELECT
    statement_timestamp(),
    (
        SELECT look_at
        FROM pg_task_schedules
        WHERE app = $1
          AND removed_at IS NULL
          AND look_at > statement_timestamp()
        ORDER BY look_at
        LIMIT 1
    ),
    name,
    cron,
    zone,
    missed,
    max_missed,
    overlap,
    next_at,
    paused_at IS NOT NULL,
    overlap = 'skip' AND EXISTS (SELECT FROM pg_task WHERE id = last_task AND pg_task.error IS NULL)
FROM (SELECT) AS always
LEFT JOIN due ON true
