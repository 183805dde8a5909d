-- Take up to $3 due tasks of one lane (queue $1, priority $2), oldest first, under the lease token $4 for $5 seconds.
--
-- The sub-select is MATERIALIZED, so it runs once and never locks more than $3 rows, and an array leaves the planner no
-- other way to the rows than their primary key, whatever it believes of the table. The rows come in no order.
-- The claim counts itself in `claims`; the outcome will clear it. A claim that a server crash undoes is harmless, so
-- it does not wait for the disk. A step larger than $6 bytes is not sent, only its size.
-- What fell due before $7 (seconds since the epoch) is passed over: the index entries of tasks that are gone lie there,
-- and while some transaction keeps them alive, each claim would read all of them again.
WITH picked AS MATERIALIZED (
    SELECT id
    FROM pg_task
    WHERE queue = $1
      AND priority = $2
      AND wakeup_at <= now()
      AND wakeup_at >= to_timestamp($7)
      AND locked_by IS NULL
      AND error IS NULL
    ORDER BY wakeup_at
    LIMIT $3
    FOR NO KEY UPDATE SKIP LOCKED
)
UPDATE pg_task AS task
SET locked_by = $4,
    lock_expires_at = clock_timestamp() + make_interval(secs => $5),
    claims = least(claims, 1000000) + 1
FROM set_config('synchronous_commit', 'off', true)
WHERE task.id = ANY (ARRAY (SELECT id FROM picked))
RETURNING
    task.id,
    CASE WHEN octet_length(task.step) <= $6 THEN task.step END,
    task.tried,
    task.claims,
    CASE WHEN octet_length(task.step) > $6 THEN octet_length(task.step) END,
    date_part('epoch', task.wakeup_at)
