-- Insert a batch of tasks: ids $1, steps $2, times $3 or delays in seconds $4 (both null: now), queues $5, priorities $6,
-- keys $7 (each key once, or null), times $8 or seconds $9 after which they expire; in this order. Traced: trace $10 of all.
-- Grouped: as members of the group $11.
-- Does not return tasks whose key is already in the table.
INSERT INTO pg_task (
    id, step, wakeup_at, queue, priority, key, expires_at
    -- traced: , trace
    -- grouped: , group_id
)
SELECT
    id,
    step,
    coalesce(at, clock_timestamp() + make_interval(secs => coalesce(delay, 0))),
    queue,
    priority,
    key,
    coalesce(expires_at, clock_timestamp() + make_interval(secs => expires_in))
    -- traced: , $10
    -- grouped: , $11::bigint
FROM unnest($1::uuid[], $2::text[], $3::timestamptz[], $4::float8[], $5::text[], $6::smallint[], $7::text[],
    $8::timestamptz[], $9::float8[])
    AS new (id, step, at, delay, queue, priority, key, expires_at, expires_in)
ON CONFLICT (key) WHERE key IS NOT NULL DO NOTHING
RETURNING key, id
