-- Insert one task: id $1, step $2, at the time $3 or after $4 seconds (both null: now), queue $5, priority $6, key $7.
-- No row comes back if a task with that key is in the table.
INSERT INTO pg_task (id, step, wakeup_at, queue, priority, key)
VALUES ($1, $2, coalesce($3, clock_timestamp() + make_interval(secs => coalesce($4::float8, 0))), $5, $6, $7)
ON CONFLICT DO NOTHING
RETURNING id
