-- Insert a batch of tasks that have keys: ids $1, steps $2, queues $3, priorities $4, keys $5 (each key once).
-- Those whose key is in the table already do not come back.
INSERT INTO pg_task (id, step, queue, priority, key)
SELECT *
FROM unnest($1::uuid[], $2::text[], $3::text[], $4::smallint[], $5::text[])
ON CONFLICT DO NOTHING
RETURNING key, id
