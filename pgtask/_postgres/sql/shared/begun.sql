    -- Lock the record of each run of `fenced` whose first entry this is, for progress.sql. If another session has locked
    -- it, the run is not held this time. A run without a record needs none. Plan: the order leaves only the primary key,
    -- since the id is also the last column of another index.
    LEFT JOIN LATERAL (
        SELECT id
        FROM pg_task_runs
        WHERE id BETWEEN fenced.run AND fenced.run
          AND fenced.version IS NOT NULL
        ORDER BY id
        LIMIT 1
        FOR NO KEY UPDATE SKIP LOCKED
    ) AS record ON true
    WHERE (
        fenced.version IS NULL
        OR record.id IS NOT NULL
        OR (SELECT id FROM pg_task_runs AS seen WHERE seen.id BETWEEN fenced.run AND fenced.run ORDER BY id LIMIT 1) IS NULL
    )
