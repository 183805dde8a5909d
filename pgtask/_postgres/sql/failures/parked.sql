-- The parked ones among the tasks $1, in that order.
SELECT id, step, error, tried, queue, priority, key, created_at, updated_at AS parked_at
FROM unnest($1::uuid[]) WITH ORDINALITY AS requested (id, place)
JOIN pg_task USING (id)
WHERE error IS NOT NULL
ORDER BY place
