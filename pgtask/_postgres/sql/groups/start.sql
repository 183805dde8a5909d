-- Begin the group $1, whose members this transaction inserts: whether it keeps results $2, what parked members do to its end
-- $3, and the step $4 that is enqueued at its end with its queue $5 and priority $6. Returns its id, or nothing if there is
-- a group with this name.
INSERT INTO pg_task_groups (name, results, on_parked, then_step, then_queue, then_priority)
VALUES ($1, $2, $3, $4, $5, $6)
ON CONFLICT (name) DO NOTHING
RETURNING id
