-- Enqueue, signal and cancel in SQL: for triggers, for procedures, and for languages that have no client. They work in the
-- transaction of the caller, by the rights of the caller, and refuse what a client refuses, in its words, with SQLSTATE
-- 22023 (invalid_parameter_value).
--
-- The search_path of each is the schema of pg_task, so that callers find the table wherever they are. The plans are those
-- of a client: by the indexes, with any statistics.

-- Return whether a text has printable characters only: as str.isprintable() in Python, but for characters that Unicode has
-- not assigned yet.
CREATE OR REPLACE FUNCTION pg_task_is_printable(text text) RETURNS boolean LANGUAGE sql IMMUTABLE AS $$
    SELECT $1 !~ (
        '[\u0001-\u001f\u007f-\u00a0\u00ad\u0600-\u0605\u061c\u06dd\u070f\u0890\u0891\u08e2\u1680\u180e\u2000-\u200f'
        '\u2028-\u202f\u205f-\u206f\u3000\ue000-\uf8ff\ufeff\ufff9-\ufffb\U000e0001-\U000e007f\U000f0000-\U0010fffd]'
    )
$$;

-- Refuse a name that is not 1 to 255 printable characters.
CREATE OR REPLACE FUNCTION pg_task_check_name(what text, name text) RETURNS void LANGUAGE plpgsql IMMUTABLE AS $$
BEGIN
    IF name IS NULL OR length(name) NOT BETWEEN 1 AND 255 OR NOT pg_task_is_printable(name) THEN
        RAISE invalid_parameter_value
            USING MESSAGE = format('%s %s must be named by 1 to 255 printable characters', what, left(quote_nullable(name), 80));
    END IF;
END
$$;

-- Refuse what PostgreSQL takes for JSON and a worker does not: half a surrogate pair, and a number beyond double precision.
-- jsonb refuses the former, and NUL, which a worker takes.
CREATE OR REPLACE FUNCTION pg_task_check_json(what text, value json) RETURNS void LANGUAGE plpgsql IMMUTABLE AS $$
BEGIN
    IF position('\u' IN value::text) > 0 THEN
        PERFORM replace(value::text, '\u0000', '\u0001')::jsonb;
    END IF;
    IF value::text ~ '[0-9][eE]\+?[0-9]{3}|[0-9]{255}'
        AND jsonb_path_exists(
            replace(value::text, '\u0000', '\u0001')::jsonb,
            'strict $.** ? (@.type() == "number" && (@ > 1.7976931348623158e308 || @ < -1.7976931348623158e308))'
        )
    THEN
        RAISE numeric_value_out_of_range;
    END IF;
EXCEPTION WHEN data_exception THEN
    RAISE invalid_parameter_value
        USING MESSAGE = format(
            '%s cannot be stored as JSON: %s', what,
            CASE WHEN SQLSTATE = '22003' THEN 'Number out of range' ELSE SQLERRM END
        );
END
$$;

-- Enqueue a task, and return its id; with a key that another task has, the id of that one.
--
-- The type json keeps the fields as they are given. The policy of the step is in the code of the app, which SQL cannot
-- read: so the queue is `default` and the priority 0, unless they are given.
CREATE OR REPLACE FUNCTION pgtask_enqueue(
    step     text,
    fields   json        DEFAULT NULL,
    key      text        DEFAULT NULL,
    queue    text        DEFAULT NULL,
    priority bigint      DEFAULT NULL,
    at       timestamptz DEFAULT NULL,
    after    interval    DEFAULT NULL
) RETURNS uuid LANGUAGE plpgsql AS $$
#variable_conflict use_column
DECLARE
    dot      constant integer := coalesce(length($1) - position('.' IN reverse($1)) + 1, 0);
    family   constant text    := left($1, dot - 1);
    name     constant text    := substr($1, dot + 1);
    envelope constant text    := format('{%s:{%s:%s}}', to_json(family), to_json(name), coalesce($2::text, 'null'));
    wrong    text;
    due      timestamptz;
    id       uuid;
    holder   uuid;
    added    bigint;
    stored   constant text    := pg_task_scoped_key(family, $3);
BEGIN
    IF $1 IS NULL OR dot NOT BETWEEN 2 AND length($1) - 1 THEN
        wrong := format(
            'step %s must be named by its task and its step, as Greeter.ReadName; that of a workflow is Run, that of a '
            '@task is Call', left(quote_nullable($1), 80)
        );
    ELSIF name <> 'Run' AND json_typeof($2) NOT IN ('object', 'null') THEN
        wrong := format(
            'step %s cannot be decoded: Expected `object`, got `%s`, so no worker could run it; a transparent step needs '
            'INSERT INTO pg_task (step)', $1, json_typeof($2)
        );
    ELSIF octet_length(envelope) > 524288 THEN
        wrong := format(
            'step %s is %s bytes, more than the 524288 allowed; store the data elsewhere and enqueue a reference to it',
            $1, octet_length(envelope)
        );
    ELSIF length($4) NOT BETWEEN 1 AND 255 OR position(',' IN $4) > 0 OR NOT pg_task_is_printable($4) THEN
        wrong := format(
            'queue %s must be a printable string of 1 to 255 characters without a comma', left(quote_literal($4), 80)
        );
    ELSIF $5 NOT BETWEEN -32768 AND 32767 THEN
        wrong := format('priority %s must be a whole number from -32768 to 32767', $5);
    ELSIF length($3) NOT BETWEEN 1 AND 512 THEN
        wrong := format('key %s must be 1 to 512 characters without NUL', left(quote_literal($3), 80));
    ELSIF octet_length(stored) > 2600 THEN
        wrong := format(
            'key %s has %s bytes with the name %s before it, more than the 2600 that an index can hold',
            left(quote_literal($3), 80), octet_length(stored), left(quote_literal(family), 80)
        );
    ELSIF $6 IS NOT NULL AND $7 IS NOT NULL THEN
        wrong := 'give either after= or at=, not both';
    ELSIF NOT isfinite($6) OR $6 < '0001-01-01 00:00+00' OR $6 >= '10000-01-01 00:00+00' THEN
        wrong := format('at=%s is out of the range of times', $6);
    ELSIF $7 < interval '0' OR $7 > interval '365000 days' THEN
        wrong := format('delay %s must be zero or more, at most 365000 days', $7);
    END IF;
    IF wrong IS NOT NULL THEN
        RAISE invalid_parameter_value USING MESSAGE = wrong;
    END IF;
    PERFORM pg_task_check_name('task', family);
    PERFORM pg_task_check_name('step', name);
    PERFORM pg_task_check_json('step ' || $1, $2);

    due := coalesce($6, clock_timestamp() + coalesce($7, interval '0'));
    -- As a client makes it: a UUID of version 7, in the order of time.
    id := encode(
        set_bit(set_bit(
            overlay(uuid_send(gen_random_uuid()) PLACING substring(int8send((extract(epoch FROM clock_timestamp()) * 1000)::bigint) FROM 3) FROM 1 FOR 6),
            52, 1), 53, 1),
        'hex'
    )::uuid;
    IF $3 IS NULL THEN
        INSERT INTO pg_task (id, step, wakeup_at, queue, priority)
        VALUES (id, envelope, due, coalesce($4, 'default'), coalesce($5, 0));
        GET DIAGNOSTICS added = ROW_COUNT;
        IF added = 1 THEN
            RETURN id;
        END IF;
        RAISE invalid_parameter_value
            USING MESSAGE = 'the task was not inserted: a trigger, rule or row security policy of yours on pg_task keeps it out';
    END IF;

    FOR try IN 1..20 LOOP
        INSERT INTO pg_task (id, step, wakeup_at, queue, priority, key)
        VALUES (id, envelope, due, coalesce($4, 'default'), coalesce($5, 0), stored)
        ON CONFLICT (key) WHERE key IS NOT NULL DO NOTHING;
        GET DIAGNOSTICS added = ROW_COUNT;
        IF added = 1 THEN
            RETURN id;
        END IF;
        SELECT task.id INTO holder FROM pg_task AS task WHERE task.key = stored;
        IF FOUND THEN
            RETURN holder;
        END IF;
        -- The task with this key was finished in between: there is room for ours now.
    END LOOP;
    RAISE invalid_parameter_value
        USING MESSAGE = format(
            'the task with the key %L was not inserted, and there is none: a trigger, rule or row security policy of yours '
            'on pg_task keeps it out', $3
        );
END
$$;

-- Send a signal to a run, which keeps it until it waits for one of this name.
CREATE OR REPLACE FUNCTION pgtask_signal(run uuid, name text, value json DEFAULT NULL) RETURNS void LANGUAGE plpgsql AS $$
DECLARE
    is_run boolean;
BEGIN
    PERFORM pg_task_check_name('signal', $2);
    PERFORM pg_task_check_json(format('signal %s: its value', $2), $3);
    EXECUTE $statement$
-- include: runs/signal.sql
    $statement$ INTO is_run USING $1, $2, coalesce($3::text, 'null');
    IF is_run IS NULL THEN
        RAISE invalid_parameter_value
            USING MESSAGE = format('run %s has ended, or never was; signal %s was not sent', coalesce($1::text, 'NULL'), $2);
    ELSIF NOT is_run THEN
        RAISE invalid_parameter_value
            USING MESSAGE = format('task %s is not the run of a workflow; signal %s was not sent', $1, $2);
    END IF;
END
$$;

-- Cancel a run, with its children, or remove another task that no worker holds. Returns whether it has done so; false if
-- the task is gone, or if a worker holds it.
CREATE OR REPLACE FUNCTION pgtask_cancel(task uuid) RETURNS boolean LANGUAGE plpgsql AS $$
#variable_conflict use_column
DECLARE
    is_run     boolean;
    removed    record;
    generation uuid[] := ARRAY[$1];
    gone       uuid[] := '{}';
    is_done    boolean;
BEGIN
    SELECT pg_task_workflow(step) IS NOT NULL INTO is_run FROM pg_task WHERE id = $1;
    IF NOT is_run AND has_table_privilege('pg_task_runs', 'SELECT') THEN
        is_run := EXISTS (SELECT FROM pg_task_runs WHERE id = $1);
    END IF;
    IF is_run IS NOT TRUE THEN
        DELETE FROM pg_task
        WHERE id = $1
          AND (locked_by IS NULL OR lock_expires_at < now());
        RETURN FOUND;
    END IF;
    IF current_setting('transaction_isolation') NOT IN ('read committed', 'read uncommitted') THEN
        RAISE invalid_parameter_value
            USING MESSAGE = format(
                'a run cannot be cancelled in a transaction that is %s, which does not see what children the run has spawned '
                'since it began; make it READ COMMITTED', upper(current_setting('transaction_isolation'))
            );
    END IF;

    -- Level by level: a run that is gone spawns nothing more, so all its children are visible then.
    WHILE cardinality(generation) > 0 LOOP
        gone := '{}';
        FOR removed IN EXECUTE $statement$
-- include: runs/cancel.sql
        $statement$ USING generation, true
        LOOP
            gone := gone || removed.id;
        END LOOP;
        is_done := coalesce(is_done, gone <> '{}');
        EXECUTE $statement$
SELECT coalesce(array_agg(id ORDER BY id), '{}') FROM (
-- include: runs/children.sql
) AS children
        $statement$ INTO generation USING gone;
    END LOOP;
    RETURN is_done;
END
$$;

DO $$
DECLARE
    home constant text := current_setting('search_path');
    name text;
BEGIN
    FOREACH name IN ARRAY ARRAY[
        'pg_task_check_name(text, text)',
        'pg_task_check_json(text, json)',
        'pgtask_enqueue(text, json, text, text, bigint, timestamptz, interval)',
        'pgtask_signal(uuid, text, json)',
        'pgtask_cancel(uuid)'
    ]
    LOOP
        EXECUTE format('ALTER FUNCTION %s SET search_path = %s, pg_temp', name, home);
        IF name LIKE 'pgtask%' THEN
            EXECUTE format('ALTER FUNCTION %s SET enable_seqscan = off', name);
            EXECUTE format('ALTER FUNCTION %s SET enable_bitmapscan = off', name);
            EXECUTE format('ALTER FUNCTION %s SET enable_hashjoin = off', name);
            EXECUTE format('ALTER FUNCTION %s SET enable_mergejoin = off', name);
        END IF;
    END LOOP;
END
$$;
