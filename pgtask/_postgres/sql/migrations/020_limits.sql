-- Limits of steps (docs/limits.md). A task waits for its limit while
--
--   limit_key   is set: the name of the limit, a space, the key; and
--   wakeup_at   is infinity: no other claim finds it. `limit_at` is the time at which it is due.
--
-- A claim of limits leases such a task and leaves wakeup_at: leased rows with a key at infinity are what the limit counts.
-- Whatever gives the task another wakeup_at (a retry, a command, plain SQL) ends both, without knowing of limits; the next
-- worker that claims the task has it wait for its limit again.
--
-- The new columns have no default: the server rewrites no row. The indexes hold only tasks with a limit.
DO $$
BEGIN
    IF NOT EXISTS (
        SELECT FROM pg_attribute
        WHERE attrelid = 'pg_task'::regclass AND attname = 'limit_key' AND NOT attisdropped
    ) THEN
        ALTER TABLE pg_task
            ADD COLUMN limit_key  text COLLATE "C",
            ADD COLUMN limit_at   timestamptz,
            ADD COLUMN limit_cost float8;
    END IF;
END
$$;

-- Tasks that wait for their limits, key by key, and lane by lane; within a lane the oldest first.
CREATE INDEX IF NOT EXISTS pg_task_limited_idx ON pg_task (limit_key, queue, priority, limit_at)
    WHERE limit_key IS NOT NULL AND wakeup_at = 'infinity' AND locked_by IS NULL AND error IS NULL;

-- What a limit counts.
CREATE INDEX IF NOT EXISTS pg_task_limit_held_idx ON pg_task (limit_key)
    WHERE limit_key IS NOT NULL AND wakeup_at = 'infinity' AND locked_by IS NOT NULL;

-- Tasks that wait for a retry or are parked: under a limit in strict order they hold up those behind them.
CREATE INDEX IF NOT EXISTS pg_task_limit_before_idx ON pg_task (limit_key)
    WHERE limit_key IS NOT NULL AND wakeup_at < 'infinity';

DO $$
BEGIN
    IF to_regclass('pg_task_limits') IS NULL THEN
        CREATE TABLE pg_task_limits (
            name         text COLLATE "C" PRIMARY KEY,
            concurrency  integer,
            rate         float8,
            burst        float8,
            cost_rate    float8,
            cost_burst   float8,
            cost_of      text,
            failures     integer,
            pause        float8,
            is_shared    boolean     NOT NULL DEFAULT false,
            weights      jsonb,
            is_strict    boolean     NOT NULL DEFAULT false,
            paused_until timestamptz,
            declared     jsonb,
            changed      text[]      NOT NULL DEFAULT '{}',
            changed_by   text,
            updated_at   timestamptz NOT NULL DEFAULT now(),
            CONSTRAINT pg_task_limits_check CHECK (
                concurrency >= 0 AND rate > 0 AND burst >= 1 AND cost_rate > 0 AND cost_burst > 0 AND failures > 0 AND pause > 0
            )
        );
        GRANT SELECT ON pg_task_limits TO PUBLIC;
    END IF;
    IF to_regclass('pg_task_limit_keys') IS NULL THEN
        CREATE TABLE pg_task_limit_keys (
            limit_key    text COLLATE "C" PRIMARY KEY,
            next_at      timestamptz,
            cost_next_at timestamptz,
            paused_until timestamptz,
            failures     integer NOT NULL DEFAULT 0,
            turns        float8,
            turn_at      timestamptz
        ) WITH (fillfactor = 50, autovacuum_vacuum_scale_factor = 0, autovacuum_vacuum_threshold = 5000);
        GRANT SELECT ON pg_task_limit_keys TO PUBLIC;
    END IF;
END
$$;

-- Workers read the limits anew when one appears or goes, as they do with the pauses.
CREATE OR REPLACE TRIGGER pg_task_limits_changed
    AFTER INSERT OR UPDATE OR DELETE ON pg_task_limits
    FOR EACH STATEMENT EXECUTE FUNCTION pg_task_notify_paused();

-- A role that could work on tasks before can still do so: a claim notes what a key has used.
DO $$
DECLARE
    worker record;
BEGIN
    FOR worker IN
        SELECT DISTINCT CASE WHEN grantee = 0 THEN 'PUBLIC' ELSE quote_ident(pg_get_userbyid(grantee)) END AS name
        FROM pg_class
        CROSS JOIN LATERAL aclexplode(relacl)
        WHERE pg_class.oid = 'pg_task'::regclass
          AND privilege_type = 'UPDATE'
          AND grantee <> relowner
    LOOP
        EXECUTE format('GRANT SELECT, INSERT, UPDATE ON pg_task_limits TO %s', worker.name);
        EXECUTE format('GRANT SELECT, INSERT, UPDATE, DELETE ON pg_task_limit_keys TO %s', worker.name);
    END LOOP;
END
$$;

-- What a key owes is a time under the rate of its limit: with another rate it is another time.
CREATE OR REPLACE FUNCTION pg_task_rescale_limit() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    UPDATE pg_task_limit_keys
    SET next_at = CASE
            WHEN next_at > now() THEN now() + (next_at - now()) * coalesce(OLD.rate / NEW.rate, 0)
        END,
        cost_next_at = CASE
            WHEN cost_next_at > now() THEN now() + (cost_next_at - now()) * coalesce(OLD.cost_rate / NEW.cost_rate, 0)
        END
    WHERE limit_key >= NEW.name || ' '
      AND limit_key < NEW.name || '!'
      AND (next_at > now() OR cost_next_at > now());
    RETURN NULL;
END
$$;

CREATE OR REPLACE TRIGGER pg_task_limit_rescaled
    AFTER UPDATE OF rate, cost_rate ON pg_task_limits
    FOR EACH ROW
    WHEN ((OLD.rate, OLD.cost_rate) IS DISTINCT FROM (NEW.rate, NEW.cost_rate))
    EXECUTE FUNCTION pg_task_rescale_limit();

-- Note what steps under limits have shown, key by key: failed tries, a try that ended well, the seconds for which the key
-- pauses (null: none), and units that a step has used beside those of its field.
CREATE OR REPLACE FUNCTION pg_task_note_limits(
    keys text[], failed integer[], succeeded boolean[], seconds float8[], charges float8[]
) RETURNS void LANGUAGE sql AS $$
    INSERT INTO pg_task_limit_keys AS state (limit_key, failures, paused_until, cost_next_at)
    SELECT
        note.key,
        note.failed,
        clock_timestamp() + make_interval(secs => greatest(
            note.seconds, CASE WHEN note.failed >= rule.failures THEN rule.pause END
        )),
        CASE WHEN note.charge / rule.cost_rate IS NOT NULL THEN
            clock_timestamp() + make_interval(secs => greatest(-31536000, least(note.charge / rule.cost_rate, 31536000)))
        END
    FROM unnest($1, $2, $3, $4, $5) AS note (key, failed, succeeded, seconds, charge)
    LEFT JOIN pg_task_limits AS rule ON rule.name = split_part(note.key, ' ', 1)
    ORDER BY note.key
    ON CONFLICT (limit_key) DO UPDATE
    SET failures = CASE
            WHEN EXCLUDED.limit_key = ANY (
                SELECT key FROM unnest($1, $3) AS note (key, succeeded) WHERE succeeded
            ) THEN EXCLUDED.failures
            ELSE least(state.failures + EXCLUDED.failures, 1000000)
        END,
        paused_until = greatest(
            state.paused_until,
            EXCLUDED.paused_until,
            CASE WHEN EXCLUDED.failures > 0 AND EXCLUDED.limit_key <> ALL (
                SELECT key FROM unnest($1, $3) AS note (key, succeeded) WHERE succeeded
            ) THEN (
                SELECT clock_timestamp() + make_interval(secs => rule.pause)
                FROM pg_task_limits AS rule
                WHERE rule.name = split_part(state.limit_key, ' ', 1)
                  AND state.failures + EXCLUDED.failures >= rule.failures
            ) END
        ),
        cost_next_at = coalesce(
            greatest(state.cost_next_at, clock_timestamp()) + (EXCLUDED.cost_next_at - clock_timestamp()),
            state.cost_next_at
        )
$$;
