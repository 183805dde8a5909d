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

-- Return how many tasks of each queue are in each state: `due`, `scheduled`, `leased` or `parked`; and for how many seconds
-- the oldest of those that are due has been. A task is due also while a worker holds its row and runs it, in a turn; so is
-- one whose lease has expired.
--
-- It counts no further than 1,000 of each state, which the lanes share, and 50 of a lane. Beyond that, the number is the
-- estimate of the planner, or what was counted if that is more, and `is_estimate` is true. Parked tasks: of the queues of
-- the 1,000 that were parked last, and of those that have waiting or leased tasks.
CREATE OR REPLACE FUNCTION pgtask_depth(only_queue text DEFAULT NULL)
RETURNS TABLE (queue text, state text, tasks bigint, is_estimate boolean, oldest_due double precision)
LANGUAGE plpgsql STABLE AS $$
#variable_conflict use_column
BEGIN
    RETURN QUERY
    WITH lane AS MATERIALIZED (
        SELECT queue, priority, first_due, greatest(50, 1000 / count(*) OVER ()) AS most FROM pg_task_lanes($1)
    ),
    waiting AS (
        SELECT lane.queue, lane.priority, lane.most, lane.first_due, side.state, side.condition, counted.tasks
        FROM lane
        CROSS JOIN (VALUES ('due', '<='), ('scheduled', '>')) AS side (state, condition)
        CROSS JOIN LATERAL (
            SELECT count(*) AS tasks
            FROM (
                (
                    SELECT
                    FROM pg_task
                    WHERE queue = lane.queue
                      AND priority = lane.priority
                      AND wakeup_at <= statement_timestamp()
                      AND locked_by IS NULL
                      AND error IS NULL
                      AND side.state = 'due'
                    LIMIT lane.most
                )
                UNION ALL
                (
                    SELECT
                    FROM pg_task
                    WHERE queue = lane.queue
                      AND priority = lane.priority
                      AND wakeup_at > statement_timestamp()
                      AND locked_by IS NULL
                      AND error IS NULL
                      AND side.state = 'scheduled'
                    LIMIT lane.most
                )
            ) AS some_rows
        ) AS counted
        WHERE counted.tasks > 0
    ),
    leased AS MATERIALIZED (
        SELECT queue, has_expired, count(*) AS tasks, min(wakeup_at) AS oldest
        FROM (
            SELECT queue, wakeup_at, lock_expires_at <= statement_timestamp() AS has_expired
            FROM pg_task
            WHERE locked_by IS NOT NULL
              AND error IS NULL
            ORDER BY lock_expires_at
            LIMIT 1000
        ) AS first
        GROUP BY queue, has_expired
    ),
    parked AS MATERIALIZED (
        SELECT queue, count(*) AS tasks
        FROM (
            SELECT queue
            FROM pg_task
            WHERE error IS NOT NULL
            ORDER BY wakeup_at DESC
            LIMIT 1000
        ) AS last
        GROUP BY queue
    ),
    held AS (
        SELECT queue, 'leased' AS state, 'locked_by IS NOT NULL' AS condition, tasks,
            (SELECT sum(tasks) FROM leased) >= 1000 AS is_full
        FROM leased
        WHERE NOT has_expired
        UNION ALL
        SELECT known.queue, 'parked', 'error IS NOT NULL', coalesce(tasks, 0),
            coalesce((SELECT sum(tasks) FROM parked), 0) >= 1000
        FROM (
            SELECT queue FROM parked UNION SELECT queue FROM leased UNION SELECT queue FROM lane UNION SELECT $1 WHERE $1 IS NOT NULL
        ) AS known
        LEFT JOIN parked ON parked.queue = known.queue
    ),
    found AS (
        SELECT queue, state, tasks, tasks >= most AS is_estimate, CASE WHEN state = 'due' THEN first_due END AS oldest,
            CASE WHEN tasks >= most THEN format(
                'locked_by IS NULL AND error IS NULL AND queue = %L AND priority = %s AND wakeup_at %s %L',
                queue, priority, condition, statement_timestamp()
            ) END AS condition
        FROM waiting
        UNION ALL
        SELECT queue, 'due', tasks, false, oldest, NULL
        FROM leased
        WHERE has_expired
        UNION ALL
        SELECT queue, state, tasks, is_full, NULL, CASE WHEN is_full THEN format('%s AND queue = %L', condition, queue) END
        FROM held
    )
    SELECT
        queue,
        state,
        sum(CASE WHEN is_estimate THEN greatest(tasks, pg_task_estimate(condition)) ELSE tasks END)::bigint,
        bool_or(is_estimate),
        CASE WHEN min(oldest) IS NOT NULL THEN
            greatest(0, extract(epoch FROM statement_timestamp())::float8 - extract(epoch FROM min(oldest))::float8)
        END
    FROM found
    WHERE $1 IS NULL OR queue = $1
    GROUP BY queue, state
    HAVING sum(tasks) > 0 OR bool_or(is_estimate);
END
$$;

-- Return how many tasks are due or leased, of one queue or of all, as `pgtask_depth` counts them: the work that workers
-- have, or could have now.
CREATE OR REPLACE FUNCTION pgtask_backlog(queue text DEFAULT NULL) RETURNS bigint LANGUAGE plpgsql STABLE AS $$
BEGIN
    RETURN (SELECT coalesce(sum(tasks), 0) FROM pgtask_depth($1) WHERE state IN ('due', 'leased'));
END
$$;

DO $$
DECLARE
    home constant text := current_setting('search_path');
    name text;
    setting text;
BEGIN
    FOREACH name IN ARRAY ARRAY[
        'pgtask_oldest_due(text)', 'pgtask_depth(text)', 'pgtask_backlog(text)'
    ]
    LOOP
        EXECUTE format('ALTER FUNCTION %s SET search_path = %s, pg_temp', name, home);
        FOREACH setting IN ARRAY ARRAY['enable_seqscan', 'enable_bitmapscan', 'enable_sort', 'jit'] LOOP
            EXECUTE format('ALTER FUNCTION %s SET %s = off', name, setting);
        END LOOP;
        EXECUTE format('ALTER FUNCTION %s SET plan_cache_mode = force_generic_plan', name);
    END LOOP;
END
$$;
