-- Decide whether a burst over the queues $1 (null: all) may end. Returns whether some task is leased, here or
-- elsewhere, and so may come back, except tasks of other apps, whose envelopes $2 matches (null: there are none); and
-- whether some task is parked.
SELECT
    EXISTS (
        SELECT FROM pg_task
        WHERE locked_by IS NOT NULL
          AND ($1::text[] IS NULL OR queue = ANY ($1))
          AND (
              $2::text IS NULL
              OR
              -- include: shared/envelope.sql
              !~ $2
          )
    ),
    EXISTS (
        SELECT FROM pg_task
        WHERE error IS NOT NULL
          AND ($1::text[] IS NULL OR queue = ANY ($1))
    )
