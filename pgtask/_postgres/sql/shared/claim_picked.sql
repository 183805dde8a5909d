-- The end of each claim: lease the tasks of the CTE `picked` under the token $4 for $5 seconds, and return them in no
-- order.
--
-- An array leaves the planner no other way to the rows than their primary key, independent of its statistics of the
-- table. The claim counts itself in `claims`; the outcome clears it. A claim that a server crash undoes is harmless, so
-- it does not wait for the disk. It does not send a step larger than $6 bytes, only its size; that of a task which has
-- expired is -1. The last column is its group.
UPDATE pg_task AS task
SET locked_by = $4,
    lock_expires_at = clock_timestamp() + make_interval(secs => $5),
    claims = least(claims, 1000000) + 1,
    position = 0
FROM set_config('synchronous_commit', 'off', true)
WHERE task.id = ANY (ARRAY (SELECT id FROM picked))
RETURNING
    task.id,
    CASE WHEN octet_length(task.step) <= $6 THEN task.step END,
    task.tried,
    task.claims,
    CASE
        WHEN octet_length(task.step) > $6 THEN octet_length(task.step)
        WHEN task.expires_at < now() AND task.claims = 1 AND task.tried = 0 THEN -1
    END,
    date_part('epoch', task.wakeup_at)
    -- traced: , task.trace, CASE WHEN task.trace IS NOT NULL THEN task.queue END
    , task.group_id
