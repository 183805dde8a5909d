-- The waiting tasks of one lane, queue $2 and priority $7, that are due up to the time $8; the oldest first, as they
-- are claimed. Parameters and columns are otherwise those of list_parked.sql.
SELECT id, at, place, matches, nth
FROM (
    SELECT
        id,
        at,
        place,
        matches,
        row_number() OVER () AS nth,
        lead(false, 1, true) OVER () AS is_last
    FROM (
        SELECT
            id,
            wakeup_at AS at,
            ctid AS place,
            $1::text IS NULL OR left(step, 1024) ~ $1 AS matches
        FROM pg_task
        WHERE locked_by IS NULL
          AND error IS NULL
          AND queue = $2
          AND priority = $7
          AND wakeup_at >= $3
          AND wakeup_at <= $8
          AND (wakeup_at > $3 OR ctid > $4)
        ORDER BY wakeup_at
        LIMIT $5
    ) AS scanned
) AS numbered
WHERE matches
   OR is_last
LIMIT $6
