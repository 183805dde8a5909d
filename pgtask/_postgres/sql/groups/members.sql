-- Find members of the group $8 that the filter $2 to $7 chooses, up to $10 behind the id $9, in the order of ids, created
-- before $11 (null: any), of one kind $1: 'started', 'added' or 'parked', as in purge.sql. Plan: as there.
WITH wanted AS MATERIALIZED (
    SELECT id, first_task, last_task
    FROM pg_task_groups
    WHERE name = $8
)
(
    SELECT id
    FROM pg_task
    WHERE $1::text = 'started'
      AND id BETWEEN (SELECT first_task FROM wanted) AND (SELECT last_task FROM wanted)
      AND group_id = (SELECT id FROM wanted)
      AND error IS NULL
      AND id > $9
-- include: shared/matching.sql
      AND ($11::timestamptz IS NULL OR created_at <= $11)
    ORDER BY id
    LIMIT $10
)
UNION ALL
(
    SELECT id
    FROM pg_task
    WHERE $1::text = 'added'
      AND group_id = -(SELECT id FROM wanted)
      AND group_id < 0
      AND error IS NULL
      AND id > $9
-- include: shared/matching.sql
      AND ($11::timestamptz IS NULL OR created_at <= $11)
    ORDER BY id
    LIMIT $10
)
UNION ALL
(
    SELECT id
    FROM pg_task
    WHERE $1::text = 'parked'
      AND abs(group_id) = (SELECT id FROM wanted)
      AND group_id IS NOT NULL
      AND error IS NOT NULL
      AND id > $9
-- include: shared/matching.sql
      AND ($11::timestamptz IS NULL OR created_at <= $11)
    ORDER BY id
    LIMIT $10
)
