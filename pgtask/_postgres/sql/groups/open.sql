-- List the groups that have not ended, up to 1,000 from the id $1 on: id, members that are left, those that are done, and
-- whether the group is being cancelled. Plan: the index of open groups, which are few however many there were.
SELECT
    grouped.id,
    grouped.total + counted.added - counted.done - counted.cancelled,
    counted.done,
    grouped.state = 'cancelling'
FROM pg_task_groups AS grouped
-- include: shared/group_sums.sql
WHERE grouped.ended_at IS NULL
  AND grouped.id > $1
ORDER BY grouped.id
LIMIT 1000
