-- Insert one task as enqueue.sql does, without a key, so that only a trigger or rule of the user can keep it out.
-- Traced: trace $9.
INSERT INTO pg_task (
    id, step, wakeup_at, queue, priority, expires_at
    -- traced: , trace
)
VALUES (
    $1,
    $2,
    coalesce($3, clock_timestamp() + make_interval(secs => coalesce($4::float8, 0))),
    $5,
    $6,
    coalesce($7, clock_timestamp() + make_interval(secs => $8::float8))
    -- traced: , $9
)
RETURNING id
