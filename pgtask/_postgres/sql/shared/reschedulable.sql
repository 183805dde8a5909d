-- The tasks that become due at the time $8 in bulk.
      AND behind IS NULL
      AND (error IS NOT NULL OR locked_by IS NOT NULL OR wakeup_at <> $8::timestamptz)
-- include: shared/unleased.sql
-- include: shared/not_paused.sql
