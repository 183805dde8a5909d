-- Release the leases of a dead worker: those with tokens from $1 to $2, which begin with its eight bytes. With $8, only
-- those of these tasks.
--
-- The implicated tasks, $3, are those that it may have been executing, and the one that began or ended last. Each
-- counts this claim as a death. A third death parks the task with the cause $5, if it ran alone ($4); in company the
-- count stays below three. The implicated tasks run again in two halves: a `wakeup_at` of its own, to the microsecond,
-- makes each half one group (suspects.py). A task that is the only one of its half waits 1 s after the first death,
-- then 5 s. The other tasks never started: their claim is undone.
--
-- Locks the rows FOR NO KEY UPDATE and skips locked ones: the dead worker's session, named $6, may be in the middle of
-- a flush, or of a claim that commits after this statement has begun. So the caller repeats this until no lease is left
-- and, since one such statement, that session has ended. Behind a pooler sessions have no name: any transaction of our
-- role that was open $7 seconds ago may be one of the dead worker. Plan: reads only the leased rows, once by the index
-- of leases (IS TRUE keeps the planner from a second time) and then by the primary key; with $8, only by that.
WITH orphaned AS MATERIALIZED (
    SELECT id
    FROM pg_task
    WHERE locked_by IS NOT NULL
      AND lock_expires_at > '-infinity'
      AND locked_by BETWEEN $1 AND $2
      AND $8::uuid[] IS NULL
    UNION ALL
    SELECT id
    FROM pg_task
    WHERE id = ANY ($8::uuid[])
      AND (locked_by BETWEEN $1 AND $2) IS TRUE
),
free AS MATERIALIZED (
    SELECT id
    FROM pg_task
    WHERE id = ANY (ARRAY (SELECT id FROM orphaned))
      AND (locked_by BETWEEN $1 AND $2) IS TRUE
    FOR NO KEY UPDATE SKIP LOCKED
),
implicated AS MATERIALIZED (
    SELECT id, number > (size + 1) / 2 AS is_second, (size + (number <= (size + 1) / 2)::integer) / 2 AS half
    FROM (
        SELECT id, row_number() OVER () AS number, count(*) OVER () AS size
        FROM free
        WHERE id = ANY ($3::uuid[])
    ) AS numbered
),
released AS (
    UPDATE pg_task AS task
    SET locked_by = NULL,
        lock_expires_at = NULL,
        claims = CASE
            WHEN id <> ALL ($3::uuid[]) THEN greatest(claims - 1, 0)
            WHEN claims < 3 THEN claims
            WHEN $4 THEN 0
            ELSE 2
        END,
        wakeup_at = CASE
            WHEN id <> ALL ($3::uuid[]) OR (claims >= 3 AND $4) THEN wakeup_at
            ELSE now() + CASE
                WHEN id = ANY (ARRAY (SELECT id FROM implicated WHERE half > 1)) THEN interval '0.2 s'
                WHEN claims < 2 THEN interval '1 s'
                ELSE interval '5 s'
            END + CASE
                WHEN id = ANY (ARRAY (SELECT id FROM implicated WHERE is_second)) THEN interval '1 us'
                ELSE '0'
            END
        END,
        error = CASE
            WHEN id = ANY ($3::uuid[]) AND claims >= 3 AND $4 THEN format(
                'worker process died %s times while running %s: %s',
                claims,
                coalesce(array_to_string(
                    regexp_match(left(step, 1000), '^\s*\{\s*"((?:[^"\\]|\\.)*)"\s*:\s*\{\s*"((?:[^"\\]|\\.)*)"\s*:'), '.'
                ), 'a step'),
                $5::text
            )
            ELSE error
        END
    WHERE id = ANY (ARRAY (SELECT id FROM free))
    RETURNING id, claims, error
)
SELECT
    (SELECT count(*) FROM orphaned) - (SELECT count(*) FROM released),
    EXISTS (
        SELECT FROM pg_stat_activity
        WHERE application_name = $6
           OR (
               xact_start < now() - make_interval(secs => $7)
               AND (datid, usesysid) = (SELECT datid, usesysid FROM pg_stat_activity WHERE pid = pg_backend_pid())
           )
    ),
    (SELECT count(*) FROM released WHERE id <> ALL ($3::uuid[])),
    ARRAY (SELECT id FROM released WHERE id = ANY ($3::uuid[]) AND error IS NULL),
    ARRAY (SELECT id FROM released WHERE id = ANY ($3::uuid[]) AND error IS NOT NULL),
    CASE WHEN EXISTS (SELECT FROM released) THEN pg_notify('pg_task_changed', '')::text END
