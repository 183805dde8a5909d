-- Whether the group of the table `known` has members that wait or run: a look from the right end of the ids of its start, since
-- tasks are done from the left, and one at the index of those that were added.
        EXISTS (
            SELECT
            FROM (
                SELECT id
                FROM pg_task
                WHERE id BETWEEN known.first_task AND known.last_task
                  AND group_id = known.id
                  AND error IS NULL
                ORDER BY id DESC
                LIMIT 1
            ) AS last_started
        )
        OR EXISTS (SELECT FROM pg_task WHERE group_id = -known.id AND group_id < 0 AND error IS NULL)
