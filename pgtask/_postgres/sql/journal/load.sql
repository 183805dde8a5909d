-- What the journal holds of the runs $1, as a row for each checkpoint (one without, of a run that has none): the task's
-- wakeup_at, the time here, whether there is a record, its version and state; then the checkpoint.
SELECT
    asked.id,
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
FROM unnest($1::uuid[]) AS asked (id)
LEFT JOIN pg_task AS task ON task.id = asked.id
LEFT JOIN pg_task_runs AS run ON run.id = asked.id
LEFT JOIN pg_task_checkpoints AS checkpoint ON checkpoint.run = asked.id
