-- Let go of runs that wait: $1 under the tokens $2, whose wakeup_at was $3 when they looked for what they wait for. They
-- are woken at $4 (null: never), have tried $5 times, and say that they wait for $6. $7 and $8: the children they wait
-- for, as pairs of run and child, $9 how many that are of each run, and $10 whether one of these is enough.
--
-- A run is not let go if something has come since it looked: its wakeup_at has changed, or too many of the children have
-- ended. What comes back, of each run that is held: whether it was let go, and its wakeup_at. Paused it is for as long as
-- it has the wakeup_at that is noted as paused_until: only then is it woken by what it waits for.
--
-- Which children have ended is decided as in collect.sql. A record that does not agree with its task is mended.
WITH live AS MATERIALIZED (
    SELECT pair.run, pair.child, record.state, record.ended_at
    FROM unnest($7::uuid[], $8::uuid[]) AS pair (run, child)
    JOIN pg_task_runs AS record ON record.id = pair.child
    JOIN pg_task AS task ON task.id = pair.child AND task.error IS NULL
),
-- One that has ended since this statement began has another record than we have seen.
awaited AS (
    UPDATE pg_task_runs AS child
    SET awaited = true,
        state = NULL,
        error = NULL,
        ended_at = NULL
    FROM live
    WHERE child.id = live.child
      AND child.state IS NOT DISTINCT FROM live.state
      AND child.ended_at IS NOT DISTINCT FROM live.ended_at
    RETURNING live.run
),
remaining AS MATERIALIZED (
    SELECT run, count(*)::integer AS children
    FROM awaited
    GROUP BY run
),
held AS MATERIALIZED (
    SELECT wait.*, task.wakeup_at, (SELECT max(children) FROM remaining WHERE remaining.run = wait.run) AS remaining
    FROM unnest($1::uuid[], $2::uuid[], $3::timestamptz[], $4::timestamptz[], $5::integer[], $6::text[], $9::integer[], $10::boolean[])
        AS wait (run, token, seen_at, due_at, tried, waits_on, children, any_child)
    JOIN pg_task AS task ON task.id = wait.run AND task.locked_by = wait.token
    FOR NO KEY UPDATE OF task SKIP LOCKED
),
decided AS MATERIALIZED (
    SELECT
        *,
        wakeup_at = seen_at
        AND (children = 0 OR coalesce(remaining, 0) >= CASE WHEN any_child THEN children ELSE 1 END) AS lets_go
    FROM held
),
paused AS (
    UPDATE pg_task AS task
    SET wakeup_at = coalesce(decided.due_at, 'infinity'),
        tried = decided.tried,
        locked_by = NULL,
        lock_expires_at = NULL,
        claims = 0,
        updated_at = now()
    FROM decided
    WHERE task.id = decided.run
      AND decided.lets_go
),
noted AS (
    UPDATE pg_task_runs AS run
    SET waits_on = decided.waits_on,
        paused_until = coalesce(decided.due_at, 'infinity'),
        waits_for = CASE WHEN decided.any_child THEN least(1, decided.remaining) ELSE coalesce(decided.remaining, 0) END
    FROM decided
    WHERE run.id = decided.run
      AND decided.lets_go
)
SELECT run, lets_go, wakeup_at
FROM decided
