-- Remove archived tasks that finished before $1, the oldest first, at most $2, and none from before $3: the
-- end of the last batch, so that its dead index entries are not read again. Returns the number and the end of this
-- batch.
WITH pruned AS (
    DELETE FROM pg_task_archive
    WHERE ctid = ANY (ARRAY (
        SELECT ctid
        FROM pg_task_archive
        WHERE finished_at < $1
          AND finished_at >= $3
        ORDER BY finished_at
        LIMIT $2
        FOR UPDATE SKIP LOCKED
    ))
    RETURNING finished_at
)
SELECT count(*), max(finished_at)
FROM pruned
