-- Note that the group $1 was started with $2 members, of which those with the ids from $3 to $4 have its id, and the others
-- its id times -1. Tells all workers, which look at the pauses and learn from them that there is a group.
UPDATE pg_task_groups
SET total = $2,
    first_task = $3,
    last_task = $4
WHERE id = $1
RETURNING pg_notify('pg_task_changed', 'paused')::text
