-- What holds back is seen: tasks that wait for a limit have a state of their own in pgtask_depth, and the keys of
-- limits that are paused are found without a look at the others.

-- The keys with a pause, of Throttled or a breaker; those whose pause has passed leave the table after a minute.
CREATE INDEX IF NOT EXISTS pg_task_limit_paused_idx ON pg_task_limit_keys (limit_key, paused_until)
    WHERE paused_until IS NOT NULL;

-- Return how many tasks of each queue are in each state: `due`, `limited`, `scheduled`, `leased` or `parked`; and for how
-- many seconds the oldest of those that are due has been. A task is due also while a worker holds its row and runs it, in a
-- turn; so is one whose lease has expired. It is limited if it would be due without its limit.
--
-- It counts no further than 1,000 of each state, which the lanes share, and 50 of a lane. Beyond that, the number is the
-- estimate of the planner, or what was counted if that is more, and `is_estimate` is true. Parked tasks: of the queues of
-- the 1,000 that were parked last, and of those that have waiting or leased tasks.
--
-- Limited tasks lie at the end of their lanes, at infinity, among those that wait for another task or are on hold. It reads
-- as many rows there as it counts, to tell them apart; where no task waits for a limit, it reads none.
CREATE OR REPLACE FUNCTION pgtask_depth(only_queue text DEFAULT NULL)
RETURNS TABLE (queue text, state text, tasks bigint, is_estimate boolean, oldest_due double precision)
LANGUAGE plpgsql STABLE AS $$
#variable_conflict use_column
DECLARE
    limits constant boolean := EXISTS (
        SELECT
        FROM pg_task
        WHERE limit_key IS NOT NULL
          AND wakeup_at = 'infinity'
          AND locked_by IS NULL
          AND error IS NULL
    );
    latest constant timestamptz := CASE WHEN limits THEN '294276-12-31 00:00+00' ELSE 'infinity' END;
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
                      AND wakeup_at <= latest
                      AND locked_by IS NULL
                      AND error IS NULL
                      AND side.state = 'scheduled'
                    LIMIT lane.most
                )
            ) AS some_rows
        ) AS counted
        WHERE counted.tasks > 0
    ),
    endless AS MATERIALIZED (
        SELECT lane.queue, lane.priority, lane.most, counted.*
        FROM lane
        CROSS JOIN LATERAL (
            SELECT count(*) AS tasks, count(*) FILTER (WHERE limit_at <= statement_timestamp()) AS limited
            FROM (
                SELECT CASE WHEN limit_key IS NOT NULL THEN limit_at END AS limit_at
                FROM pg_task
                WHERE queue = lane.queue
                  AND priority = lane.priority
                  AND wakeup_at = 'infinity'
                  AND locked_by IS NULL
                  AND error IS NULL
                LIMIT lane.most
            ) AS some_rows
        ) AS counted
        WHERE limits
          AND counted.tasks > 0
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
            1.0::float8 AS share, CASE WHEN tasks >= most THEN format(
                'locked_by IS NULL AND error IS NULL AND queue = %L AND priority = %s AND wakeup_at %s %L AND wakeup_at <= %L',
                queue, priority, condition, statement_timestamp(), latest
            ) END AS condition
        FROM waiting
        UNION ALL
        SELECT queue, part.state, part.tasks, endless.tasks >= most, NULL, part.tasks::float8 / endless.tasks, format(
            'locked_by IS NULL AND error IS NULL AND queue = %L AND priority = %s AND wakeup_at = ''infinity''', queue, priority
        )
        FROM endless
        CROSS JOIN LATERAL (VALUES ('limited', limited), ('scheduled', endless.tasks - limited)) AS part (state, tasks)
        WHERE part.tasks > 0
        UNION ALL
        SELECT queue, 'due', tasks, false, oldest, 1.0, NULL
        FROM leased
        WHERE has_expired
        UNION ALL
        SELECT queue, state, tasks, is_full, NULL, 1.0, CASE WHEN is_full THEN format('%s AND queue = %L', condition, queue) END
        FROM held
    )
    SELECT
        queue,
        state,
        sum(CASE WHEN is_estimate THEN greatest(tasks, share * pg_task_estimate(condition)) ELSE tasks END)::bigint,
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

-- Return how many tasks are due, limited or leased, of one queue or of all, as `pgtask_depth` counts them: the work for which
-- a worker must be there. One that waits for its limit starts only when a worker claims it.
CREATE OR REPLACE FUNCTION pgtask_backlog(queue text DEFAULT NULL) RETURNS bigint LANGUAGE plpgsql STABLE AS $$
BEGIN
    RETURN (SELECT coalesce(sum(tasks), 0) FROM pgtask_depth($1) WHERE state IN ('due', 'limited', 'leased'));
END
$$;

DO $$
DECLARE
    home constant text := current_setting('search_path');
    name text;
    setting text;
BEGIN
    FOREACH name IN ARRAY ARRAY['pgtask_depth(text)', 'pgtask_backlog(text)'] LOOP
        EXECUTE format('ALTER FUNCTION %s SET search_path = %s, pg_temp', name, home);
        FOREACH setting IN ARRAY ARRAY['enable_seqscan', 'enable_bitmapscan', 'enable_sort', 'jit'] LOOP
            EXECUTE format('ALTER FUNCTION %s SET %s = off', name, setting);
        END LOOP;
        EXECUTE format('ALTER FUNCTION %s SET plan_cache_mode = force_generic_plan', name);
    END LOOP;
END
$$;
