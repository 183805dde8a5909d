-- Take a signal for each of the runs $1 (each once), fenced by the tokens $2: the oldest one named $3, as the checkpoint
-- numbered $4 at the place $5, whose wait is over at $6 (null: never). $7 as the version in record.sql.
--
-- The checkpoint is made at once if it has a due time, and is completed by the signal or by the end of that time, in the
-- order in which this statement sees them. A complete checkpoint stays unchanged: so this may be sent again. Returns for
-- each run that is held: the result of the checkpoint, its error, its due time, and the wakeup_at that the task had when
-- this statement looked at the signals; signal.sql changes that (the locked row may have a later one, of a signal that this
-- statement cannot see). The others have lost their lease, or another session has
-- locked a row that this writes: that of the task, the record (if this is the first checkpoint), the checkpoint, or the
-- oldest signal. Lock order: as named.
--
-- Plan: by the primary keys, independent of statistics. The index of the signals is the only one in the order of a run's
-- signals: the condition on it is no equality, which would leave only the id to sort by. The deletion is bounded by either
-- index.
WITH fenced AS MATERIALIZED (
    SELECT entry.*, task.claims
    FROM unnest($1::uuid[], $2::uuid[], $3::text[], $4::integer[], $5::text[], $6::timestamptz[], $7::integer[])
        AS entry (run, token, name, number, place, due_at, version)
    -- include: shared/fence.sql
),
seen AS MATERIALIZED (
    SELECT
        fenced.*,
        before.run IS NOT NULL AS is_there,
        before.result AS old_result,
        before.error AS old_error,
        before.due_at AS old_due_at,
        signal.id AS signal,
        signal.payload
    FROM fenced
    LEFT JOIN LATERAL (
        SELECT run, result, error, due_at
        FROM pg_task_checkpoints
        WHERE run = fenced.run
          AND number = fenced.number
        OFFSET 0
    ) AS before ON true
    LEFT JOIN LATERAL (
        SELECT id, payload
        FROM pg_task_signals
        WHERE (run, name) >= (fenced.run, fenced.name)
          AND (run, name) <= (fenced.run, fenced.name)
          AND before.result IS NULL
          AND before.error IS NULL
        ORDER BY run, name, id
        LIMIT 1
    ) AS signal ON true
),
held AS MATERIALIZED (
    SELECT fenced.*, record.id AS record
    FROM seen AS fenced
    LEFT JOIN LATERAL (
        SELECT run
        FROM pg_task_checkpoints
        WHERE run = fenced.run
          AND number = fenced.number
          AND fenced.is_there
        FOR NO KEY UPDATE SKIP LOCKED
    ) AS checkpoint ON true
    LEFT JOIN LATERAL (
        SELECT id
        FROM pg_task_signals
        WHERE id BETWEEN fenced.signal AND fenced.signal
        ORDER BY id
        LIMIT 1
        FOR UPDATE SKIP LOCKED
    ) AS oldest ON true
    -- include: shared/begun.sql
    AND (checkpoint.run IS NOT NULL OR NOT fenced.is_there)
    AND (oldest.id IS NOT NULL OR fenced.signal IS NULL)
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
    FROM held
),
taken AS (
    DELETE FROM pg_task_signals
    WHERE id = ANY (ARRAY (SELECT signal FROM decided WHERE signal IS NOT NULL))
      AND run = ANY (ARRAY (SELECT run FROM decided WHERE signal IS NOT NULL))
),
-- A look that finds nothing is no progress.
progressed AS (
    SELECT run, claims
    FROM decided
    WHERE result IS NOT NULL
       OR error IS NOT NULL
),
-- include: shared/progress.sql
recorded AS (
    INSERT INTO pg_task_checkpoints AS checkpoint (run, number, place, kind, name, result, error, due_at)
    SELECT run, number, place, 'signal', name, result, error, due_at
    FROM decided
    WHERE result IS NOT NULL
       OR error IS NOT NULL
       OR (due_at IS NOT NULL AND NOT is_there)
    ON CONFLICT (run, number) DO UPDATE
    SET result = excluded.result,
        error = excluded.error,
        recorded_at = now()
    WHERE checkpoint.result IS NULL
      AND checkpoint.error IS NULL
)
SELECT
    run,
    result,
    error,
    coalesce(old_due_at, due_at),
    (SELECT wakeup_at FROM pg_task AS seen WHERE seen.id = decided.run)
FROM decided
