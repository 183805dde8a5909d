-- Parked tasks, the newest first: ids and places of up to $6 that match the pattern $1 (of the step) and the queue $2
-- (null: any), and always the last row read, so that the caller knows how many were: `nth`.
--
-- Goes on after the place $3, $4 (time and tid: rows of one time lie in the index in the order of their tids). Reads
-- $5 rows at most. The window functions read row by row, so the scan stops where the limit is reached.
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
            ($1::text IS NULL OR left(step, 1024) ~ $1) AND ($2::text IS NULL OR queue = $2) AS matches
        FROM pg_task
        WHERE error IS NOT NULL
          AND wakeup_at <= $3
          AND (wakeup_at < $3 OR ctid < $4)
        ORDER BY wakeup_at DESC
        LIMIT $5
    ) AS scanned
) AS numbered
WHERE matches
   OR is_last
LIMIT $6
