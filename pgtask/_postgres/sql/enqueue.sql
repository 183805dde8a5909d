-- Insert one task: id $1, step $2, at the time $3 or after $4 seconds (both null: now), queue $5, priority $6. It expires
-- at the time $7 or after $8 seconds (both null: never). Key $9. Traced: trace $10.
--
-- Returns no row if the table has a task with that key, or if a trigger or rule of the user keeps the row out. It
-- raises violations of other unique indexes, which are not ours.
INSERT INTO pg_task (
    id, step, wakeup_at, queue, priority, expires_at, key
    -- traced: , trace
)
VALUES (
    $1,
    $2,
    coalesce($3, clock_timestamp() + make_interval(secs => coalesce($4::float8, 0))),
    $5,
    $6,
    coalesce($7, clock_timestamp() + make_interval(secs => $8::float8)),
    $9
    -- traced: , $10
)
ON CONFLICT (key) WHERE key IS NOT NULL DO NOTHING
RETURNING id
