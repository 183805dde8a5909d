-- Resume the things of the kinds $1 with the names $2; all, if both are null. Returns those that were paused. Locks in the
-- order of the primary key.
WITH these AS MATERIALIZED (
    SELECT kind, name
    FROM pg_task_pauses
    WHERE $1::text[] IS NULL
       OR (kind, name) IN (SELECT * FROM unnest($1::text[], $2::text[]))
    ORDER BY kind, name
    FOR UPDATE
)
DELETE FROM pg_task_pauses AS pause
USING these
WHERE pause.kind = these.kind AND pause.name = these.name
RETURNING pause.kind, pause.name
