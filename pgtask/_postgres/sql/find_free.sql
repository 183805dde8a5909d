-- Find tasks that wait behind another one with their key, where that is gone, among the next $3 behind the place ($1, $2)
-- in the index of such tasks. Returns them; how many it has looked at; and the last place.
--
-- The time of a place is text, since Python cannot hold each of them. Plan: the index of such tasks, then the index of keys.
WITH waiting AS MATERIALIZED (
    SELECT id, behind, substr(key, 2) AS other
    FROM pg_task
    WHERE behind IS NOT NULL
      AND (behind, id) > ($1::text::timestamptz, $2::uuid)
    ORDER BY behind, id
    LIMIT $3
),
last AS (
    SELECT behind::text AS behind, id
    FROM waiting
    OFFSET greatest((SELECT count(*) FROM waiting) - 1, 0)
)
SELECT
    ARRAY (SELECT id FROM waiting WHERE NOT EXISTS (SELECT FROM pg_task WHERE key = waiting.other)),
    (SELECT count(*) FROM waiting),
    (SELECT behind FROM last),
    (SELECT id FROM last)
