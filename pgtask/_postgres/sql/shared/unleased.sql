-- The condition that no worker holds the task.
      AND (locked_by IS NULL OR lock_expires_at < now())
