-- Read the histories of the runs $1, a row for each checkpoint behind the number $2 (null: for all); one row, without a
-- checkpoint, of a run that has none: the task's wakeup_at, the time of the database, whether there is a record, its version
-- and state, and whether the result and the error are left for another time; then the checkpoint.
--
-- Sends 16 MB of results and errors at most, and the one that exceeds this. Those behind it are left: the later ones of
-- that run, and all of the runs after it.
--
-- Plan: by the primary keys. The sum runs along as the rows come, without a sort.
SELECT
    id,
    wakeup_at,
    clock_timestamp(),
    is_known,
    version,
    state,
    sent - size >= 16777216,
    number,
    place,
    kind,
    name,
    CASE WHEN sent - size < 16777216 THEN result END,
    CASE WHEN sent - size < 16777216 THEN error END,
    due_at,
    tried
FROM (
    SELECT
        requested.id,
        task.wakeup_at,
        run.id IS NOT NULL AS is_known,
        run.version,
        run.state,
        checkpoint.*,
        sum(checkpoint.size) OVER (ROWS UNBOUNDED PRECEDING) AS sent
    FROM unnest($1::uuid[], $2::integer[]) AS requested (id, after)
    LEFT JOIN LATERAL (SELECT wakeup_at FROM pg_task WHERE id = requested.id OFFSET 0) AS task ON true
    LEFT JOIN LATERAL (
        SELECT id, version, state FROM pg_task_runs WHERE id BETWEEN requested.id AND requested.id ORDER BY id LIMIT 1
    ) AS run ON true
    LEFT JOIN LATERAL (
        SELECT
            number,
            place,
            kind,
            name,
            result,
            error,
            due_at,
            tried,
            coalesce(octet_length(result), 0) + coalesce(octet_length(error), 0) AS size
        FROM pg_task_checkpoints
        WHERE run = requested.id
          AND number > coalesce(requested.after, 0)
        ORDER BY run, number
        OFFSET 0
    ) AS checkpoint ON true
) AS history
