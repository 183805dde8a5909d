-- What starts when, again and again: a row for each schedule that an app declares. Workers of the app look for rows whose
-- time has come; the statement that starts a task moves the row to its next time. The index has the rows that they look
-- for.
DO $$
BEGIN
    IF to_regclass('pg_task_schedules') IS NULL THEN
        CREATE TABLE pg_task_schedules (
            name        text        NOT NULL,
            app         text        NOT NULL,
            cron        text        NOT NULL,
            zone        text        NOT NULL DEFAULT 'UTC',
            step        text        NOT NULL,
            workflow    text,
            queue       text        NOT NULL DEFAULT 'default',
            priority    smallint    NOT NULL DEFAULT 0,
            missed      text        NOT NULL DEFAULT 'latest',
            max_missed  integer     NOT NULL DEFAULT 1000,
            overlap     text        NOT NULL DEFAULT 'skip',
            next_at     timestamptz NOT NULL,
            look_at     timestamptz NOT NULL,
            last_at     timestamptz,
            last_task   uuid,
            skipped_at  timestamptz,
            error       text,
            paused_at   timestamptz,
            paused_by   text,
            removed_at  timestamptz,
            declared_at timestamptz NOT NULL DEFAULT now(),
            PRIMARY KEY (name),
            CONSTRAINT pg_task_schedules_missed_check CHECK (missed IN ('skip', 'latest', 'all')),
            CONSTRAINT pg_task_schedules_overlap_check CHECK (overlap IN ('skip', 'allow'))
        );
        GRANT SELECT ON pg_task_schedules TO PUBLIC;
    END IF;
END
$$;

CREATE INDEX IF NOT EXISTS pg_task_schedules_look_idx ON pg_task_schedules (app, look_at) WHERE removed_at IS NULL;
