-- The tasks that a retry in bulk changes.
      AND behind IS NULL
      AND (error IS NOT NULL OR tried > 0 OR wakeup_at > now() OR locked_by IS NOT NULL)
-- include: shared/unleased.sql
