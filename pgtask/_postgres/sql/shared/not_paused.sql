-- The condition that the task is no run that pauses: what wakes a run compares its time with that of the pause.
      AND (error IS NOT NULL OR wakeup_at <= now() OR wakeup_at IS DISTINCT FROM pg_task_paused_until(id))
