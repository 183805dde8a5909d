-- Describe the groups with the names $1 (null: the last $2 that were started). Returns name, state, whether it keeps results,
-- its members: in all, done, parked, cancelled; when it was started and ended, the task that was enqueued at its end, and
-- the time now.
--
-- The counts are exact where up to 5,000 members are left. Beyond that, members that were cancelled one by one or removed by
-- SQL count as left, and of parked ones it counts 5,000; then it trusts the counts of those that were parked. Plan: the
-- sums by the primary key, and up to 5,000 rows of members by each of three indexes.
WITH grouped AS MATERIALIZED (
    (
        SELECT *
        FROM pg_task_groups
        WHERE name = ANY ($1::text[])
    )
    UNION ALL
    (
        SELECT *
        FROM pg_task_groups
        WHERE $1::text[] IS NULL
        ORDER BY id DESC
        LIMIT $2
    )
),
summed AS MATERIALIZED (
    SELECT
        grouped.id,
        grouped.first_task,
        grouped.last_task,
        grouped.total + counted.added AS total,
        counted.done,
        counted.parked AS was_parked,
        grouped.total + counted.added - counted.done - counted.cancelled AS left
    FROM grouped
-- include: shared/group_sums.sql
),
found AS MATERIALIZED (
    SELECT
        id,
        (
            SELECT count(*)
            FROM (
                SELECT
                FROM pg_task
                WHERE abs(group_id) = summed.id
                  AND group_id IS NOT NULL
                  AND error IS NOT NULL
                LIMIT 5000
            ) AS some_parked
        ) AS parked,
        CASE WHEN summed.left <= 5000 THEN (
            SELECT count(*)
            FROM (
                (
                    SELECT
                    FROM pg_task
                    WHERE id BETWEEN summed.first_task AND summed.last_task
                      AND group_id = summed.id
                      AND error IS NULL
                    ORDER BY id DESC
                    LIMIT 5000
                )
                UNION ALL
                (
                    SELECT
                    FROM pg_task
                    WHERE group_id = -summed.id
                      AND group_id < 0
                      AND error IS NULL
                    LIMIT 5000
                )
            ) AS some_live
        ) END AS live
    FROM summed
),
known AS (
    SELECT
        id,
        total,
        done,
        live,
        CASE WHEN parked < 5000 THEN parked ELSE greatest(parked, least(was_parked, summed.left)) END AS parked,
        summed.left
    FROM summed
    JOIN found USING (id)
)
SELECT
    grouped.name,
    grouped.state,
    grouped.results,
    known.total,
    known.done,
    known.parked,
    CASE
        WHEN live IS NOT NULL THEN greatest(known.total - known.done - known.parked - live, 0)
        ELSE known.total - known.done - known.left
    END,
    grouped.started_at,
    grouped.ended_at,
    grouped.then_task,
    now()
FROM grouped
JOIN known USING (id)
ORDER BY grouped.id DESC
