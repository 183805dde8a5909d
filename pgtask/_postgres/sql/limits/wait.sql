-- Have the tasks $1 under the tokens $2 wait for their limits, with the keys $3: they were claimed without, and have not
-- started. The claim does not count. A retry under a limit in strict order keeps its turn.
--
-- Returns, if it has not found all, which it has found, and which are still ours: it skips rows that another session has
-- locked. Plan: as flush.sql has it.
WITH free AS MATERIALIZED (
    SELECT id
    FROM pg_task
    -- include: shared/our_leases.sql
    FOR NO KEY UPDATE SKIP LOCKED
),
put AS (
    UPDATE pg_task AS task
    SET limit_key = entry.limit_key,
        limit_at = CASE WHEN entry.is_strict AND task.limit_key = entry.limit_key
            THEN least(task.limit_at, task.wakeup_at)
            ELSE task.wakeup_at
        END,
        wakeup_at = 'infinity',
        locked_by = NULL,
        lock_expires_at = NULL,
        claims = greatest(task.claims - 1, 0),
        updated_at = now()
    FROM (
        SELECT id, limit_key, coalesce(
            (SELECT is_strict FROM pg_task_limits WHERE name = split_part(limit_key, ' ', 1)), false
        ) AS is_strict
        FROM unnest($1::uuid[], $3::text[]) AS entry (id, limit_key)
    ) AS entry
    WHERE task.id = ANY (ARRAY[entry.id])
      AND entry.id IN (SELECT id FROM free)
    RETURNING task.id
)
SELECT
    count(*),
    0,
    CASE WHEN count(*) < cardinality($1::uuid[]) THEN coalesce(array_agg(id), '{}') END,
    CASE WHEN count(*) < cardinality($1::uuid[]) THEN ARRAY (
        SELECT id
        FROM pg_task
    -- include: shared/our_leases.sql
          AND id NOT IN (SELECT id FROM put)
    ) END
FROM put
