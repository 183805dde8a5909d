-- Give back what a dead worker held: the leases with tokens from $1 to $2, all those that begin with its eight bytes.
--
-- Those that may have killed it, $3: what it was executing, and what began or ended last, count this claim as a crash and
-- wait: 1 s after the first, 5 s after the next. The third parks the task, with the cause $5, if it was alone ($4): only
-- that convicts. In company the count stops before it. The rest never started: as if never claimed.
--
-- A row that somebody has locked is passed over: the session of the dead, named $6, may be in the middle of a flush, or
-- of a claim that will be committed when we have looked. So the caller repeats this until no lease is left and, since
-- one such statement, that session is gone. Reads the leased rows only.
WITH left_behind AS MATERIALIZED (
    SELECT id
    FROM pg_task
    WHERE locked_by IS NOT NULL
      AND lock_expires_at > '-infinity'
      AND locked_by BETWEEN $1 AND $2
),
free AS MATERIALIZED (
    SELECT id
    FROM pg_task
    WHERE id = ANY (ARRAY (SELECT id FROM left_behind))
      AND locked_by BETWEEN $1 AND $2
    FOR NO KEY UPDATE SKIP LOCKED
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
            ELSE now() + make_interval(secs => CASE WHEN claims < 2 THEN 1 ELSE 5 END)
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
    (SELECT count(*) FROM left_behind) - (SELECT count(*) FROM released),
    EXISTS (SELECT FROM pg_stat_activity WHERE application_name = $6),
    (SELECT count(*) FROM released WHERE id <> ALL ($3::uuid[])),
    ARRAY (SELECT id FROM released WHERE id = ANY ($3::uuid[]) AND error IS NULL),
    ARRAY (SELECT id FROM released WHERE id = ANY ($3::uuid[]) AND error IS NOT NULL),
    CASE WHEN EXISTS (SELECT FROM released) THEN pg_notify('pg_task_changed', '')::text END
