-- Record that $1 begins the action $2 on what the filter $3 chooses. Returns the number of the action.
INSERT INTO pg_task_actions (done_by, action, filter)
VALUES ($1, $2, $3)
RETURNING id
