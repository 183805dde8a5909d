-- Write the limits that the code of an app declares, as the arrays $1 to $12 in the order of the columns. What people have
-- changed at run time stays. Writes nothing for a limit that its code has declared so before.
INSERT INTO pg_task_limits AS known (
    name, concurrency, rate, burst, cost_rate, cost_burst, cost_of, failures, pause, is_shared, weights, is_strict, declared
)
SELECT
    name, concurrency, rate, burst, cost_rate, cost_burst, cost_of, failures, pause, is_shared, weights::jsonb, is_strict,
    to_jsonb(one)
FROM unnest(
    $1::text[], $2::integer[], $3::float8[], $4::float8[], $5::float8[], $6::float8[], $7::text[], $8::integer[],
    $9::float8[], $10::boolean[], $11::text[], $12::boolean[]
) AS one (
    name, concurrency, rate, burst, cost_rate, cost_burst, cost_of, failures, pause, is_shared, weights, is_strict
)
ORDER BY name
ON CONFLICT (name) DO UPDATE
SET concurrency = CASE WHEN 'concurrency' = ANY (known.changed) THEN known.concurrency ELSE EXCLUDED.concurrency END,
    rate = CASE WHEN 'rate' = ANY (known.changed) THEN known.rate ELSE EXCLUDED.rate END,
    burst = CASE WHEN 'rate' = ANY (known.changed) THEN known.burst ELSE EXCLUDED.burst END,
    cost_rate = CASE WHEN 'cost' = ANY (known.changed) THEN known.cost_rate ELSE EXCLUDED.cost_rate END,
    cost_burst = CASE WHEN 'cost' = ANY (known.changed) THEN known.cost_burst ELSE EXCLUDED.cost_burst END,
    cost_of = EXCLUDED.cost_of,
    failures = EXCLUDED.failures,
    pause = EXCLUDED.pause,
    is_shared = EXCLUDED.is_shared,
    weights = EXCLUDED.weights,
    is_strict = EXCLUDED.is_strict,
    declared = EXCLUDED.declared,
    updated_at = now()
WHERE known.declared IS DISTINCT FROM EXCLUDED.declared
