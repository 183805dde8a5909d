-- Note what steps have shown under the limit keys $1: failed tries $2, whether one ended well after failures $3, seconds for
-- which the key pauses $4 (null: none), and units used $5 (null: none).
SELECT pg_task_note_limits($1, $2, $3, $4, $5)
