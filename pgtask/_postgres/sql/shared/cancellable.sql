-- The tasks that a cancel in bulk removes; those under a live lease only if $8.
      AND ($8::boolean OR locked_by IS NULL OR lock_expires_at < now())
