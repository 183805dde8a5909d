-- Change the task `task` so that it waits for its limit as `entry` says. A retry under a limit in strict order keeps its turn.
    SET limit_key = entry.limit_key,
        limit_cost = entry.cost,
        limit_at = CASE
            WHEN task.wakeup_at = 'infinity' THEN coalesce(task.limit_at, now())
            WHEN entry.is_strict AND task.limit_key = entry.limit_key THEN least(task.limit_at, task.wakeup_at)
            ELSE task.wakeup_at
        END,
        wakeup_at = 'infinity',
