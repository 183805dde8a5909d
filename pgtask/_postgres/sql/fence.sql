-- Prepare a transaction of a step for the statement that writes its outcome: give the settings $1 the values $2 (null: the
-- default of the session) until its end. Returns the mark with which it was begun; nothing, or an empty text, if the step
-- has ended that transaction and begun another one.
SELECT current_setting('pgtask.transaction', true)
FROM (SELECT count(set_config(name, value, true)) FROM unnest($1::text[], $2::text[]) AS wanted (name, value)) AS done
