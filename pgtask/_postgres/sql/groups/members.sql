-- Find members of the group $8 that the filter $2 to $7 chooses, up to $10 behind the id $9, in the order of ids, created
-- before $11 (null: any): parked ones if $1, else the others. Plan: an index of members.
(
    SELECT id
    FROM pg_task
    WHERE $1
      AND group_id = (SELECT id FROM pg_task_groups WHERE name = $8)
      AND error IS NOT NULL
      AND id > $9
      AND ($11::timestamptz IS NULL OR created_at <= $11)
-- include: shared/matching.sql
    ORDER BY id
    LIMIT $10
)
UNION ALL
(
    SELECT id
    FROM pg_task
    WHERE NOT $1
      AND group_id = (SELECT id FROM pg_task_groups WHERE name = $8)
      AND error IS NULL
      AND id > $9
      AND ($11::timestamptz IS NULL OR created_at <= $11)
-- include: shared/matching.sql
    ORDER BY id
    LIMIT $10
)
