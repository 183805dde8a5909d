-- The promises of pg_task 1.0 to its workers and to people, on every table: LISTEN pg_task_changed reports each change
-- that a worker may wait for, LISTEN pg_task_error each task that is parked, and `updated_at` follows updates by hand.
-- And `pgtask stop`, which needs a right and stops the fleet of one schema.
--
-- The frequent statements of our workers fire these triggers only where they park a task. They set none of their
-- columns, or do not meet their conditions: they set `updated_at` themselves, and write rows that are leased.

-- A writer with SET pgtask.notify = off (in a transaction, for a role, for a database) sends no notification: its
-- commit takes no lock of the whole cluster, and may be in two phases. The condition is written out in each function,
-- since the search_path of the writer may not lead to one of ours.
CREATE OR REPLACE FUNCTION pg_task_notify() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    IF coalesce(current_setting('pgtask.notify', true), '') NOT IN ('off', 'false', 'no', '0') THEN
        PERFORM pg_notify('pg_task_changed', '');
    END IF;
    RETURN NULL;
END
$$;

-- With the payload of pg_task 1.0. If its own triggers exist too, the server merges equal notifications of a
-- transaction.
CREATE OR REPLACE FUNCTION pg_task_notify_parked() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    IF coalesce(current_setting('pgtask.notify', true), '') NOT IN ('off', 'false', 'no', '0') THEN
        PERFORM pg_notify('pg_task_error', NEW.id::text);
    END IF;
    RETURN NULL;
END
$$;

-- For writers that do not set `updated_at`, such as a worker of pg_task 1.0. When it releases a task, other workers of
-- pg_task 1.0 sleep until a notification. Our workers count each claim, that one does not.
CREATE OR REPLACE FUNCTION pg_task_touch() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    NEW.updated_at := now();
    IF OLD.locked_by IS NOT NULL
        AND NEW.locked_by IS NULL
        AND OLD.claims = 0
        AND coalesce(current_setting('pgtask.notify', true), '') NOT IN ('off', 'false', 'no', '0')
    THEN
        PERFORM pg_notify('pg_task_changed', '');
    END IF;
    RETURN NEW;
END
$$;

-- A person has changed a task that no worker holds.
CREATE OR REPLACE TRIGGER pg_task_rescheduled
    AFTER UPDATE OF step, wakeup_at, tried, error, queue, priority ON pg_task
    FOR EACH ROW
    WHEN (
        OLD.locked_by IS NULL
        AND NEW.locked_by IS NULL
        AND (OLD.error IS NULL OR NEW.error IS NULL)
        AND (OLD.step, OLD.wakeup_at, OLD.tried, OLD.error, OLD.queue, OLD.priority)
            IS DISTINCT FROM (NEW.step, NEW.wakeup_at, NEW.tried, NEW.error, NEW.queue, NEW.priority)
    )
    EXECUTE FUNCTION pg_task_notify();

CREATE OR REPLACE TRIGGER pg_task_inserted_parked AFTER INSERT ON pg_task
    FOR EACH ROW WHEN (NEW.error IS NOT NULL)
    EXECUTE FUNCTION pg_task_notify_parked();

CREATE OR REPLACE TRIGGER pg_task_parked AFTER UPDATE OF error ON pg_task
    FOR EACH ROW WHEN (OLD.error IS NULL AND NEW.error IS NOT NULL)
    EXECUTE FUNCTION pg_task_notify_parked();

CREATE OR REPLACE TRIGGER pg_task_touched
    BEFORE UPDATE OF step, wakeup_at, tried, error, queue, priority, key ON pg_task
    FOR EACH ROW WHEN (OLD.updated_at = NEW.updated_at)
    EXECUTE FUNCTION pg_task_touch();

-- The orders to stop the workers of this schema. A worker obeys those that are younger than itself. Every worker reads
-- the table, so every role may; a right that you revoke later stays revoked.
DO $$
BEGIN
    IF to_regclass('pg_task_stops') IS NULL THEN
        CREATE TABLE pg_task_stops (
            id       bigint      GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
            given_at timestamptz NOT NULL DEFAULT now(),
            given_by text        NOT NULL DEFAULT session_user
        );
        GRANT SELECT ON pg_task_stops TO PUBLIC;
    END IF;
END
$$;

-- It runs by the rights of its owner, for each role that may change tasks, or some columns of them. If another schema
-- of the database has a fleet too, the notification names our schema: workers of pg_task in Rust ignore it then.
-- Returns the payload that was sent.
CREATE OR REPLACE FUNCTION pg_task_stop() RETURNS text LANGUAGE plpgsql SECURITY DEFINER AS $$
DECLARE
    payload text := 'stop_worker';
BEGIN
    IF NOT has_any_column_privilege(session_user, 'pg_task', 'UPDATE') THEN
        RAISE insufficient_privilege
            USING MESSAGE = format('the role %I may not stop workers, since it lacks UPDATE on pg_task', session_user);
    END IF;
    INSERT INTO pg_task_stops DEFAULT VALUES;
    IF 1 < (SELECT count(*) FROM pg_class WHERE relname = 'pg_task' AND relkind = 'r') THEN
        payload := payload || ' ' || current_schema();
    END IF;
    PERFORM pg_notify('pg_task_changed', payload);
    RETURN payload;
END
$$;

DO $$
BEGIN
    EXECUTE format('ALTER FUNCTION pg_task_stop() SET search_path = %s, pg_temp', current_setting('search_path'));
END
$$;
