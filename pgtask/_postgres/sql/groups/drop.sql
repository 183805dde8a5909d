-- Remove those of the leased tasks $1, under the tokens $2, that are members of the groups $3, which are being cancelled.
-- Returns the ids. Plan: the primary key, as our_leases.sql says.
WITH gone AS (
    DELETE FROM pg_task
    -- include: shared/our_leases.sql
      AND abs(group_id) = ANY ($3::bigint[])
    RETURNING id, group_id
),
-- include: shared/cancelled.sql
SELECT id
FROM gone
