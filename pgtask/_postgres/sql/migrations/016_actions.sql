-- What people have done to many tasks by the commands of pgtask: a row for each command. And the test of a field of a step,
-- which is false for a row that is not JSON.
DO $$
BEGIN
    IF to_regclass('pg_task_actions') IS NULL THEN
        CREATE TABLE pg_task_actions (
            id       bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
            began_at timestamptz NOT NULL DEFAULT now(),
            ended_at timestamptz,
            done_by  text        NOT NULL,
            action   text        NOT NULL,
            filter   text        NOT NULL,
            tasks    bigint      NOT NULL DEFAULT 0,
            state    text        NOT NULL DEFAULT 'running',
            CONSTRAINT pg_task_actions_state_check CHECK (state IN ('running', 'done', 'stopped', 'failed'))
        );
        GRANT SELECT ON pg_task_actions TO PUBLIC;
    END IF;
END
$$;

CREATE OR REPLACE FUNCTION pg_task_has(step text, wanted text[]) RETURNS boolean
    LANGUAGE plpgsql STABLE STRICT AS $$
DECLARE
    payload json;
    found json;
BEGIN
    payload := (
        SELECT inner_one.value
        FROM json_each(step::json) AS outer_one
        CROSS JOIN LATERAL json_each(outer_one.value) AS inner_one
        LIMIT 1
    );
    FOR at IN 1 .. array_length(wanted, 1) BY 2 LOOP
        found := payload #> string_to_array(wanted[at], '.');
        IF found IS NULL OR coalesce(found #>> '{}', 'null') <> wanted[at + 1] THEN
            RETURN false;
        END IF;
    END LOOP;
    RETURN true;
EXCEPTION
    WHEN data_exception OR statement_too_complex THEN
        RETURN false;
END
$$;
