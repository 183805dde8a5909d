-- Read the parked members of the group $8, up to $9 of them (null: all), as causes.sql does. Plan: the index of parked members.
SELECT
    id,
    wakeup_at,
    CASE WHEN octet_length(step) <= 2000 THEN step ELSE left(step, 512) END,
    split_part(CASE WHEN octet_length(error) <= 2000 THEN error ELSE left(error, 2000) END, E'\n', 1)
FROM pg_task
WHERE abs(group_id) = (SELECT id FROM pg_task_groups WHERE name = $8)
      AND group_id IS NOT NULL
      AND error IS NOT NULL
      AND $1::boolean
-- include: shared/matching.sql
LIMIT $9
