-- Count for each group what the CTE `moved` has: members that are done, that were added, and that were parked. Each session
-- has a row of its own, so that none waits for another one's. Locks the rows in the order of the groups.
counted AS (
    INSERT INTO pg_task_group_counts AS counts (group_id, slot, done, added, parked)
    SELECT abs(group_id), pg_backend_pid(), sum(done), sum(added), sum(parked)
    FROM moved
    WHERE group_id IS NOT NULL
    GROUP BY abs(group_id)
    ORDER BY abs(group_id)
    ON CONFLICT (group_id, slot) DO UPDATE
    SET done = counts.done + excluded.done,
        added = counts.added + excluded.added,
        parked = counts.parked + excluded.parked
    RETURNING group_id
)
