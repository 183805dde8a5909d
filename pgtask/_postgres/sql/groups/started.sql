-- Note that the group $1 was started with $2 members.
UPDATE pg_task_groups
SET total = $2
WHERE id = $1
