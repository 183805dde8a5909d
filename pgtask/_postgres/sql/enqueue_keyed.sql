-- Insert a batch of tasks with keys: ids $1, steps $2, queues $3, priorities $4, keys $5 (each key once), in this
-- order. Does not return tasks whose key is already in the table.
INSERT INTO pg_task (id, step, queue, priority, key)
SELECT *
FROM unnest($1::uuid[], $2::text[], $3::text[], $4::smallint[], $5::text[])
ON CONFLICT (key) WHERE key IS NOT NULL DO NOTHING
RETURNING key, id
