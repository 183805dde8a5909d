-- What people have paused: queues, tasks (workflows too) and steps. Workers and consumers claim none of their tasks. They
-- read the table at their start and when the notification 'paused' comes.
DO $$
BEGIN
    IF to_regclass('pg_task_pauses') IS NULL THEN
        CREATE TABLE pg_task_pauses (
            kind      text        NOT NULL,
            name      text        NOT NULL,
            reason    text,
            paused_at timestamptz NOT NULL DEFAULT now(),
            paused_by text        NOT NULL DEFAULT session_user,
            PRIMARY KEY (kind, name),
            CONSTRAINT pg_task_pauses_kind_check CHECK (kind IN ('queue', 'task', 'step'))
        );
        GRANT SELECT ON pg_task_pauses TO PUBLIC;
    END IF;
END
$$;

CREATE OR REPLACE FUNCTION pg_task_notify_paused() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    PERFORM pg_notify('pg_task_changed', 'paused');
    RETURN NULL;
END
$$;

CREATE OR REPLACE TRIGGER pg_task_paused
    AFTER INSERT OR UPDATE OR DELETE ON pg_task_pauses
    FOR EACH STATEMENT EXECUTE FUNCTION pg_task_notify_paused();
