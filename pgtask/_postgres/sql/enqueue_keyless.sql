-- Insert one task as enqueue.sql does, without a key, so that only a trigger or rule of the user can keep it out.
INSERT INTO pg_task (id, step, wakeup_at, queue, priority, expires_at)
VALUES (
    $1,
    $2,
    coalesce($3, clock_timestamp() + make_interval(secs => coalesce($4::float8, 0))),
    $5,
    $6,
    coalesce($7, clock_timestamp() + make_interval(secs => $8::float8))
)
RETURNING id
