-- What has happened to the members of a group of the table `grouped`: the rows of a few sessions, by their primary key.
CROSS JOIN LATERAL (
    SELECT
        coalesce(sum(done), 0)::bigint AS done,
        coalesce(sum(added), 0)::bigint AS added,
        coalesce(sum(parked), 0)::bigint AS parked,
        coalesce(sum(cancelled), 0)::bigint AS cancelled
    FROM pg_task_group_counts
    WHERE group_id = grouped.id
) AS counted
