-- One section of the list of tasks, $1: 'parked', the newest first; 'leased', the lease that expires first at the head;
-- or 'waiting', the tasks of the lane $3, $4 (its queue alone, and its priority) that are due up to the time $5, in claim order.
--
-- Returns the ids and places of up to $9 tasks that match the pattern $2 (of the step), the queues $3, the LIKE pattern $10
-- (of the error), were due or parked before $11, have the fields $12 in the step (as $7 of shared/matching.sql), and were
-- created before $13 (each null: any); and always the last row read, so that the caller knows how many were read: `nth`.
--
-- Continues after the place $6, $7 (time and tid: rows of one time lie in the index in the order of their tids). Reads
-- $8 rows at most (parked ones: and those of one time). A backward scan returns the rows of one index tuple, which are of
-- one time, forwards: an incremental sort puts them in order. $1 is a one-time filter, so one branch is executed, by the
-- index of its section; the window functions read row by row, so the scan stops where the limit is reached.
SELECT id, at, place, matches, nth
FROM (
    SELECT
        id,
        at,
        place,
        ($2::text IS NULL OR left(step, 1024) ~ $2)
            AND ($3::text[] IS NULL OR queue = ANY ($3))
            AND ($10::text IS NULL OR coalesce(error LIKE $10, false))
            AND ($11::timestamptz IS NULL OR wakeup_at < $11)
            AND ($12::text[] IS NULL OR ((step LIKE ($12::text[])[1] AND step ~ ($12::text[])[2] OR strpos(step, '\') > 0) AND pg_task_has(step, ($12::text[])[3:])))
            AND ($13::timestamptz IS NULL OR created_at <= $13) AS matches,
        row_number() OVER () AS nth,
        lead(false, 1, true) OVER () AS is_last
    FROM (
        (
            SELECT id, wakeup_at AS at, ctid AS place, step, queue, error, wakeup_at, created_at
            FROM pg_task
            WHERE $1::text = 'parked'
              AND error IS NOT NULL
              AND wakeup_at <= $6
              AND (wakeup_at < $6 OR ctid < $7)
            ORDER BY wakeup_at DESC, ctid DESC
            LIMIT $8
        )
        UNION ALL
        (
            SELECT id, lock_expires_at, ctid, step, queue, error, wakeup_at, created_at
            FROM pg_task
            WHERE $1::text = 'leased'
              AND locked_by IS NOT NULL
              AND error IS NULL
              AND lock_expires_at >= $6
              AND (lock_expires_at > $6 OR ctid > $7)
            ORDER BY lock_expires_at
            LIMIT $8
        )
        UNION ALL
        (
            SELECT id, wakeup_at, ctid, step, queue, error, wakeup_at, created_at
            FROM pg_task
            WHERE $1::text = 'waiting'
              AND locked_by IS NULL
              AND error IS NULL
              AND queue = ($3::text[])[1]
              AND priority = $4
              AND wakeup_at >= $6
              AND wakeup_at <= $5
              AND (wakeup_at > $6 OR ctid > $7)
            ORDER BY wakeup_at
            LIMIT $8
        )
    ) AS scanned
) AS numbered
WHERE matches
   OR is_last
LIMIT $9
