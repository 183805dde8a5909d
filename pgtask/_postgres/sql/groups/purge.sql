-- Remove up to $2 members of the group $1, which is being cancelled, from the id $3 on, of one kind $4: those with which it was
-- 'started' and that wait, those that were 'added' and wait, or those that are 'parked'. Returns how many it has removed, how
-- many it has read, and the id of the last of them; nothing while another session does that.
--
-- Passes over what a worker holds, and what another session has locked. Locks the row of the group first. Plan: the primary
-- key or an index of members from $3 on, so that it does not read again what was removed before; then the primary key.
WITH gate AS MATERIALIZED (
    SELECT id, first_task, last_task
    FROM pg_task_groups
    WHERE id = $1
      AND state = 'cancelling'
    FOR NO KEY UPDATE SKIP LOCKED
),
chosen AS MATERIALIZED (
    (
        SELECT id
        FROM pg_task
        WHERE $4 = 'started'
          AND id BETWEEN (SELECT first_task FROM gate) AND (SELECT last_task FROM gate)
          AND group_id = $1
          AND error IS NULL
          AND id > $3
        ORDER BY id
        LIMIT $2
    )
    UNION ALL
    (
        SELECT id
        FROM pg_task
        WHERE $4 = 'added'
          AND group_id = -(SELECT id FROM gate)
          AND group_id < 0
          AND error IS NULL
          AND id > $3
        ORDER BY id
        LIMIT $2
    )
    UNION ALL
    (
        SELECT id
        FROM pg_task
        WHERE $4 = 'parked'
          AND abs(group_id) = (SELECT id FROM gate)
          AND group_id IS NOT NULL
          AND error IS NOT NULL
          AND id > $3
        ORDER BY id
        LIMIT $2
    )
),
free AS MATERIALIZED (
    SELECT id
    FROM pg_task
    WHERE id = ANY (ARRAY (SELECT id FROM chosen))
-- include: shared/unleased.sql
    FOR UPDATE SKIP LOCKED
),
gone AS (
    DELETE FROM pg_task
    WHERE id = ANY (ARRAY (SELECT id FROM free))
    RETURNING group_id
),
-- include: shared/cancelled.sql
SELECT (SELECT count(*) FROM gone), count(*), (SELECT id FROM chosen ORDER BY id DESC LIMIT 1)
FROM chosen
WHERE EXISTS (SELECT FROM gate)
HAVING EXISTS (SELECT FROM gate)
