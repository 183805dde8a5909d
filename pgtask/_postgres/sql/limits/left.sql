-- Return whether a task waits for one of the limits $1 that may start within $2 seconds, in the queues $3 (null: all) and
-- not in the queues $5, whose envelope does not match $4. It leaves out limits and keys that pause for longer, and what is
-- behind a parked task in strict order. It reads limit by limit, each until it finds a task.
SELECT EXISTS (
    SELECT
    FROM unnest($1::text[]) AS known (name)
    LEFT JOIN pg_task_limits AS rule ON rule.name = known.name
    CROSS JOIN LATERAL (
        SELECT
        FROM pg_task AS task
        WHERE limit_key >= known.name || ' '
          AND limit_key < known.name || '!'
          AND wakeup_at = 'infinity' AND locked_by IS NULL AND error IS NULL
          AND limit_at <= now() + make_interval(secs => $2)
          AND ($3::text[] IS NULL OR queue = ANY ($3))
          AND queue <> ALL ($5::text[])
          AND (
              $4::text IS NULL
              OR
              -- include: shared/envelope.sql
              !~ $4
          )
          AND NOT EXISTS (
              SELECT
              FROM pg_task_limit_keys AS state
              WHERE state.limit_key = task.limit_key
                AND state.paused_until > now() + make_interval(secs => $2)
          )
          AND (
              rule.is_strict IS NOT TRUE
              OR NOT EXISTS (
                  SELECT
                  FROM pg_task AS first
                  WHERE first.limit_key = task.limit_key
                    AND first.wakeup_at < 'infinity'
                    AND first.error IS NOT NULL
              )
          )
        LIMIT 1
    ) AS task
    WHERE coalesce(rule.concurrency > 0, true)
      AND coalesce(rule.paused_until <= now() + make_interval(secs => $2), true)
)
