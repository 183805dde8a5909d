-- How much waits, and for how long: for autoscalers, exporters and dashboards, in a time that does not grow with the table.
--
-- By the rights of the caller, who needs SELECT on pg_task. One snapshot counts all, so a task that a worker claims
-- meanwhile counts once. The search_path and the plans are settings of the functions, as in 013; those with pg_task in
-- their name are parts of the others, and take theirs.

-- Return the planner's estimate of the rows of pg_task that meet a condition: by the statistics of the last ANALYZE, and
-- the size of the table now. Volatile, since PostgreSQL takes EXPLAIN for a command that may write.
CREATE OR REPLACE FUNCTION pg_task_estimate(condition text) RETURNS bigint LANGUAGE plpgsql VOLATILE AS $$
DECLARE
    plan json;
BEGIN
    EXECUTE 'EXPLAIN (FORMAT JSON) SELECT FROM pg_task WHERE ' || condition INTO plan;
    RETURN (plan -> 0 -> 'Plan' ->> 'Plan Rows')::float8::bigint;
END
$$;

-- Return the lanes (queue, priority) of the waiting tasks, of one queue or of all, and when the first task of each falls
-- due: a loose index scan, a probe or two of pg_task_ready_idx for each lane.
CREATE OR REPLACE FUNCTION pg_task_lanes(only_queue text) RETURNS TABLE (queue text, priority smallint, first_due timestamptz)
LANGUAGE sql STABLE AS $$
    WITH RECURSIVE lane AS (
        (
            SELECT queue, priority, wakeup_at
            FROM pg_task
            WHERE $1 IS NULL
              AND locked_by IS NULL
              AND error IS NULL
            ORDER BY queue, priority, wakeup_at
            LIMIT 1
        )
        UNION ALL
        (
            SELECT queue, priority, wakeup_at
            FROM pg_task
            WHERE queue = $1
              AND locked_by IS NULL
              AND error IS NULL
            ORDER BY priority, wakeup_at
            LIMIT 1
        )
        UNION ALL
        SELECT following.*
        FROM lane
        CROSS JOIN LATERAL (
            (
                SELECT queue, priority, wakeup_at
                FROM pg_task
                WHERE queue = lane.queue
                  AND priority > lane.priority
                  AND locked_by IS NULL
                  AND error IS NULL
                ORDER BY priority, wakeup_at
                LIMIT 1
            )
            UNION ALL
            (
                SELECT queue, priority, wakeup_at
                FROM pg_task
                WHERE $1 IS NULL
                  AND queue > lane.queue
                  AND locked_by IS NULL
                  AND error IS NULL
                ORDER BY queue, priority, wakeup_at
                LIMIT 1
            )
            LIMIT 1
        ) AS following
    )
    SELECT queue, priority, wakeup_at FROM lane
$$;

-- Return for how many seconds the oldest task has been due that no living worker has; 0 if there is none.
CREATE OR REPLACE FUNCTION pgtask_oldest_due(queue text DEFAULT NULL) RETURNS double precision LANGUAGE sql STABLE AS $$
    SELECT greatest(0, extract(epoch FROM statement_timestamp())::float8 - extract(epoch FROM least(
        (SELECT min(first_due) FROM pg_task_lanes($1)),
        (
            SELECT min(wakeup_at)
            FROM (
                SELECT wakeup_at
                FROM pg_task AS task
                WHERE locked_by IS NOT NULL
                  AND lock_expires_at <= statement_timestamp()
                  AND ($1 IS NULL OR task.queue = $1)
                ORDER BY lock_expires_at
                LIMIT 1000
            ) AS expired
        )
    ))::float8, 0)
$$;

-- 024 has pgtask_depth and pgtask_backlog, which this version had before.

DO $$
DECLARE
    home constant text := current_setting('search_path');
    setting text;
BEGIN
    EXECUTE format('ALTER FUNCTION pgtask_oldest_due(text) SET search_path = %s, pg_temp', home);
    FOREACH setting IN ARRAY ARRAY['enable_seqscan', 'enable_bitmapscan', 'enable_sort', 'jit'] LOOP
        EXECUTE format('ALTER FUNCTION pgtask_oldest_due(text) SET %s = off', setting);
    END LOOP;
    ALTER FUNCTION pgtask_oldest_due(text) SET plan_cache_mode = force_generic_plan;
END
$$;
