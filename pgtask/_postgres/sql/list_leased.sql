-- Leased tasks, the lease that ends first at the head. Parameters and columns are those of list_parked.sql.
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
            lock_expires_at AS at,
            ctid AS place,
            ($1::text IS NULL OR left(step, 1024) ~ $1) AND ($2::text IS NULL OR queue = $2) AS matches
        FROM pg_task
        WHERE locked_by IS NOT NULL
          AND error IS NULL
          AND lock_expires_at >= $3
          AND (lock_expires_at > $3 OR ctid > $4)
        ORDER BY lock_expires_at
        LIMIT $5
    ) AS scanned
) AS numbered
WHERE matches
   OR is_last
LIMIT $6
