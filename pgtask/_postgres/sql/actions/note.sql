-- Record that the action $1 has changed $2 tasks so far and is in the state $3.
UPDATE pg_task_actions
SET tasks = $2,
    state = $3,
    ended_at = CASE WHEN $3::text <> 'running' THEN clock_timestamp() END
WHERE id = $1
