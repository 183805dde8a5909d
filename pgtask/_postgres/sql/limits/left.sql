-- Return whether a task waits for one of the limits $1 that is due within $2 seconds, in the queues $3 (null: all), and
-- whose envelope does not match $4. It reads key by key, each until it finds one.
SELECT EXISTS (
    SELECT
    FROM unnest($1::text[]) AS known (name)
    CROSS JOIN LATERAL (
        SELECT
        FROM pg_task
        WHERE limit_key >= known.name || ' '
          AND limit_key < known.name || '!'
          AND wakeup_at = 'infinity' AND locked_by IS NULL AND error IS NULL
          AND limit_at <= now() + make_interval(secs => $2)
          AND ($3::text[] IS NULL OR queue = ANY ($3))
          AND (
              $4::text IS NULL
              OR
              -- include: shared/envelope.sql
              !~ $4
          )
        LIMIT 1
    ) AS task
)
