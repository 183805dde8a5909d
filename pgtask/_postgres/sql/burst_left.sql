-- May a burst over the queues $1 (null: all) end? Whether some task is leased, here or elsewhere, and so may come back,
-- and whether some task is parked.
SELECT
    EXISTS (
        SELECT FROM pg_task
        WHERE locked_by IS NOT NULL
          AND ($1::text[] IS NULL OR queue = ANY ($1))
    ),
    EXISTS (
        SELECT FROM pg_task
        WHERE error IS NOT NULL
          AND ($1::text[] IS NULL OR queue = ANY ($1))
    )
