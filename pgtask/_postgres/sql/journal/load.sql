-- Read the histories of the runs $1, a row for each checkpoint (one row, without a checkpoint, of a run that has none): the
-- task's wakeup_at, the time of the database, whether there is a record, its version and state; then the checkpoint.
SELECT
    requested.id,
    task.wakeup_at,
    clock_timestamp(),
    run.id IS NOT NULL,
    run.version,
    run.state,
    checkpoint.number,
    checkpoint.place,
    checkpoint.kind,
    checkpoint.name,
    checkpoint.result,
    checkpoint.error,
    checkpoint.due_at,
    checkpoint.tried
FROM unnest($1::uuid[]) AS requested (id)
LEFT JOIN LATERAL (SELECT wakeup_at FROM pg_task WHERE id = requested.id OFFSET 0) AS task ON true
LEFT JOIN LATERAL (
    SELECT id, version, state FROM pg_task_runs WHERE id BETWEEN requested.id AND requested.id ORDER BY id LIMIT 1
) AS run ON true
LEFT JOIN LATERAL (SELECT * FROM pg_task_checkpoints WHERE run = requested.id OFFSET 0) AS checkpoint ON true
