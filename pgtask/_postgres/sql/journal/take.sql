-- Take a signal for each of the runs $1 (each once), fenced by the tokens $2: the oldest one named $3, as the checkpoint
-- numbered $4 at the place $5, whose wait is over at $6 (null: never). $7 as the version in record.sql.
--
-- The checkpoint is made at once if there is a due time to be remembered, and is completed by the signal or by the end of
-- that time, whichever this statement sees first. One that is complete stays as it is: so this may be sent again. What
-- comes back, of each run that is held: the checkpoint's result, its error, when it is due, and the wakeup_at of the task
-- as it was when the signals were looked at; whoever sends one changes that.
WITH held AS MATERIALIZED (
    SELECT wait.*, task.wakeup_at, task.claims
    FROM unnest($1::uuid[], $2::uuid[], $3::text[], $4::integer[], $5::text[], $6::timestamptz[], $7::integer[])
        AS wait (run, token, name, number, place, due_at, version)
    JOIN pg_task AS task ON task.id = wait.run AND task.locked_by = wait.token
    FOR SHARE OF task SKIP LOCKED
),
seen AS MATERIALIZED (
    SELECT
        held.*,
        before.run IS NOT NULL AS is_there,
        before.result AS old_result,
        before.error AS old_error,
        before.due_at AS old_due_at,
        signal.id AS signal,
        signal.payload
    FROM held
    LEFT JOIN pg_task_checkpoints AS before ON before.run = held.run AND before.number = held.number
    LEFT JOIN LATERAL (
        SELECT id, payload
        FROM pg_task_signals
        WHERE run = held.run
          AND name = held.name
          AND before.result IS NULL
          AND before.error IS NULL
        ORDER BY id
        LIMIT 1
    ) AS signal ON true
),
decided AS MATERIALIZED (
    SELECT
        *,
        coalesce(old_result, payload) AS result,
        coalesce(
            old_error,
            CASE
                WHEN old_result IS NULL AND payload IS NULL AND coalesce(old_due_at, due_at) <= clock_timestamp()
                THEN 'the time for it was over'
            END
        ) AS error
    FROM seen
),
taken AS (
    DELETE FROM pg_task_signals
    USING decided
    WHERE pg_task_signals.id = decided.signal
),
begun AS (
    UPDATE pg_task_runs AS run
    SET version = decided.version,
        started_at = now()
    FROM decided
    WHERE run.id = decided.run
      AND decided.version IS NOT NULL
),
-- As in record.sql; a look that finds nothing gets the run no further.
cleared AS (
    UPDATE pg_task
    SET claims = 1
    WHERE id = ANY (ARRAY (SELECT run FROM decided WHERE claims > 1 AND (result IS NOT NULL OR error IS NOT NULL)))
),
completed AS (
    UPDATE pg_task_checkpoints AS checkpoint
    SET result = decided.result,
        error = decided.error,
        recorded_at = now()
    FROM decided
    WHERE checkpoint.run = decided.run
      AND checkpoint.number = decided.number
      AND checkpoint.result IS NULL
      AND checkpoint.error IS NULL
),
made AS (
    INSERT INTO pg_task_checkpoints (run, number, place, kind, name, result, error, due_at)
    SELECT run, number, place, 'signal', name, result, error, due_at
    FROM decided
    WHERE NOT is_there
      AND (result IS NOT NULL OR error IS NOT NULL OR due_at IS NOT NULL)
)
SELECT run, result, error, coalesce(old_due_at, due_at), wakeup_at
FROM decided
