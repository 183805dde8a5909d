-- Count a death against the tasks $1, which a dead worker may have been executing while its transaction held their rows.
--
-- Such a row says nothing of that worker: it is due, without a lease and without a count, as it was before. Each of them
-- counts one claim now, and waits 1 s, as after the first death of a lease (release_orphaned.sql). Another worker may have
-- the row by now: under a lease, which counts itself, or in a transaction, which has it locked. So the caller repeats this
-- for a while. Returns the tasks that it has charged, and how many were locked. Plan: by the primary key, since the
-- conditions match no partial index.
WITH due AS MATERIALIZED (
    SELECT id
    FROM pg_task
    WHERE id = ANY ($1::uuid[])
      AND coalesce(locked_by::text, error) IS NULL
      AND claims = 0
      AND wakeup_at <= now()
),
free AS MATERIALIZED (
    SELECT id
    FROM pg_task
    WHERE id = ANY (ARRAY (SELECT id FROM due))
      AND coalesce(locked_by::text, error) IS NULL
      AND claims = 0
    FOR NO KEY UPDATE SKIP LOCKED
),
charged AS (
    UPDATE pg_task
    SET claims = 1,
        wakeup_at = now() + interval '1 s'
    WHERE id = ANY (ARRAY (SELECT id FROM free))
    RETURNING id
)
SELECT ARRAY (SELECT id FROM charged), (SELECT count(*) FROM due) - (SELECT count(*) FROM charged)
