-- Pause the things of the kinds $1 with the names $2, for the reason $3, in the name of $4. Returns those
-- that were not paused before. One that was keeps what it says.
INSERT INTO pg_task_pauses (kind, name, reason, paused_by)
SELECT kind, name, $3, $4
FROM unnest($1::text[], $2::text[]) AS new (kind, name)
ORDER BY kind, name
ON CONFLICT DO NOTHING
RETURNING kind, name
