-- A write notifies only if a worker sleeps that serves the queue, and the task falls due before that worker looks again
-- by itself. A commit that notifies holds a lock of the whole cluster until its WAL is flushed; so commits that enqueue
-- ran one at a time.
--
-- A worker is asleep while its session holds shared advisory locks, sleep.sql: (oid of pg_task, 0), and (oid, hash of
-- the queue) for each queue that it serves, or (oid, 1) for all queues. A writer tries for the exclusive lock, and frees
-- it in the same expression: it gets it if no worker is asleep. The answer is of now, in every isolation level, and needs
-- no row: there is nothing to vacuum, and nothing stays of a worker that dies. Two writers that try in the same
-- microsecond may notify for nothing.
--
-- docs/decisions/notifications.md says why no wake-up is lost. The payload is the oid of pg_task and the queue, or
-- empty: for any listener, and all queues.
--
-- The argument of the triggers is a time until which they notify in any case, for listeners that do not say that they
-- sleep: older workers, and those of pg_task in Rust. It is compared as text, so that no write depends on the DateStyle
-- of its session: 'infinity', or UTC as 2026-11-30T09:00:00Z.
CREATE OR REPLACE FUNCTION pg_task_notify() RETURNS trigger LANGUAGE plpgsql AS $$
DECLARE
    for_all constant boolean     := TG_NARGS > 0
        AND TG_ARGV[0] COLLATE "C" > to_char(clock_timestamp() AT TIME ZONE 'UTC', 'YYYY-MM-DD"T"HH24:MI:SS"Z"');
    -- Later than any worker that sleeps now looks again: MAX_POLL in claim.py, and a second for its way.
    horizon constant timestamptz := CASE WHEN for_all THEN 'infinity' ELSE clock_timestamp() + interval '31 seconds' END;
    home    constant integer     := TG_RELID::integer;
    queues  text[];
    name    text;
BEGIN
    IF coalesce(current_setting('pgtask.notify', true), '') IN ('off', 'false', 'no', '0')
        OR (NOT for_all AND pg_try_advisory_lock(home, 0) AND pg_advisory_unlock(home, 0))
    THEN
        RETURN NULL;
    END IF;

    IF TG_OP = 'INSERT' THEN
        SELECT array_agg(DISTINCT queue) INTO queues
        FROM added
        WHERE for_all OR (error IS NULL AND locked_by IS NULL AND wakeup_at < horizon);
    ELSIF for_all OR (NEW.error IS NULL AND NEW.wakeup_at < horizon) THEN
        queues := ARRAY[NEW.queue];
    END IF;
    IF cardinality(queues) > 100 THEN
        PERFORM pg_notify('pg_task_changed', '');
        RETURN NULL;
    END IF;

    FOREACH name IN ARRAY coalesce(queues, '{}')
    LOOP
        IF for_all
            OR NOT (pg_try_advisory_lock(home, 1) AND pg_advisory_unlock(home, 1))
            OR NOT (pg_try_advisory_lock(home, hashtext(name)) AND pg_advisory_unlock(home, hashtext(name)))
        THEN
            -- A payload has fewer than 8,000 bytes.
            PERFORM pg_notify(
                'pg_task_changed',
                CASE WHEN octet_length(name) < 4000 THEN format('%s %s', TG_RELID, name) ELSE '' END
            );
        END IF;
    END LOOP;
    RETURN NULL;
END
$$;

-- Workers that ran before this migration do not say that they sleep: they are told for one day more. The listeners that
-- --keep-pg-task is for are always told, by the triggers of pg_task where those are kept.
DO $$
DECLARE
    found     constant text    := current_setting('pgtask.found');
    keeps     constant boolean := current_setting('pgtask.keep_pg_task')::boolean;
    form      constant text    := '^(infinity|\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ)$';
    before    text;
    until     text;
    arguments text := '';
BEGIN
    SELECT split_part(encode(tgargs, 'escape'), '\000', 1) INTO before
    FROM pg_trigger
    WHERE tgrelid = 'pg_task'::regclass AND tgname = 'pg_task_inserted' AND tgnargs > 0;

    until := before;
    IF keeps AND NOT EXISTS (
        SELECT FROM pg_trigger
        WHERE tgrelid = 'pg_task'::regclass AND tgfoid = to_regproc('pg_task_notify_on_change')
    ) THEN
        until := 'infinity';
    ELSIF before !~ form
        OR (NOT keeps AND (before = 'infinity' OR found LIKE 'pg_task %' OR found ~ '^pgtask [1-8]$'))
    THEN
        until := to_char(now() AT TIME ZONE 'UTC' + interval '1 day', 'YYYY-MM-DD"T"HH24:MI:SS"Z"');
    END IF;
    IF until IS NOT NULL THEN
        arguments := quote_literal(until);
    END IF;
    IF found ~ '^pgtask (9|\d\d)' AND until IS DISTINCT FROM before THEN
        RAISE INFO 'each write notifies, until %', until;
    END IF;

    EXECUTE format(
        'CREATE OR REPLACE TRIGGER pg_task_inserted AFTER INSERT ON pg_task
         REFERENCING NEW TABLE AS added
         FOR EACH STATEMENT EXECUTE FUNCTION pg_task_notify(%s)',
        arguments
    );
    EXECUTE format(
        'CREATE OR REPLACE TRIGGER pg_task_rescheduled
             AFTER UPDATE OF step, wakeup_at, tried, error, queue, priority ON pg_task
             FOR EACH ROW
             WHEN (
                 OLD.locked_by IS NULL
                 AND NEW.locked_by IS NULL
                 AND (OLD.error IS NULL OR NEW.error IS NULL)
                 AND (OLD.step, OLD.wakeup_at, OLD.tried, OLD.error, OLD.queue, OLD.priority)
                     IS DISTINCT FROM (NEW.step, NEW.wakeup_at, NEW.tried, NEW.error, NEW.queue, NEW.priority)
             )
             EXECUTE FUNCTION pg_task_notify(%s)',
        arguments
    );
END
$$;
