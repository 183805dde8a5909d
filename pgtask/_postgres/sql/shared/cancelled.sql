-- Count the members of the CTE `gone`, which were removed since their groups are being cancelled; as counted.sql does.
counted AS (
    INSERT INTO pg_task_group_counts AS counts (group_id, slot, cancelled)
    SELECT abs(group_id), pg_backend_pid(), count(*)
    FROM gone
    GROUP BY abs(group_id)
    ORDER BY abs(group_id)
    ON CONFLICT (group_id, slot) DO UPDATE
    SET cancelled = counts.cancelled + excluded.cancelled
)
