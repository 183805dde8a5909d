-- Keep the results of those tasks of the CTE `done` that belong to groups which keep results: an object by id in the CTE
-- `kept`, as in archive_as.sql.
keeping AS MATERIALIZED (
    SELECT id
    FROM pg_task_groups
    WHERE id = ANY (ARRAY (SELECT DISTINCT abs(group_id) FROM done WHERE group_id IS NOT NULL AND EXISTS (SELECT FROM kept)))
      AND results
),
remembered AS (
    INSERT INTO pg_task_group_results (group_id, task_id, value)
    SELECT abs(done.group_id), done.id, kept.results ->> done.id::text
    FROM done
    CROSS JOIN kept
    WHERE abs(done.group_id) = ANY (ARRAY (SELECT id FROM keeping))
      AND kept.results ? done.id::text
),
