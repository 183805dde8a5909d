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

-- Lease up to `most` tasks that wait for one limit, as far as it allows: under `token`, for `seconds`.
--
--   served, skipped  the queues to serve (null: all), and those to leave out
--   others           a pattern of envelopes to leave out, or null
--   suspects         whether to take tasks whose last claim ended without an outcome
--   first            keys to look at before all others
--   after, reads     then up to `reads` keys behind the key `after` (null: from the first on)
--
-- A key has lanes (queue and priority), found by probes. Of a lane it reads 5,000 tasks at most that it has to leave out. In
-- strict order only the oldest task of a key counts, wherever it waits.
--
-- Returns first one row without an id: `step` is the key behind which the next call goes on (null: from the first on),
-- `tried` is 1 if the limit is busy, `claims` the number of keys that wait for others of
-- their tasks to end, and `due` the seconds until a key may go on that waits for a time, or null. Then the leased tasks.
--
-- The keys of a shared limit take turns: each task that a key has had counts as 1 divided by its weight, and the key with the
-- fewest comes first. One of which nothing waited for a second begins with as many as the others have.
--
-- One claim of a limit runs at a time. Each statement of this function has a snapshot of its own, taken after the lock, so
-- it sees all that the claims before it have leased. That needs READ COMMITTED, which the sessions of workers set.
CREATE OR REPLACE FUNCTION pg_task_claim_limited(
    limit_name text,
    served     text[],
    skipped    text[],
    most       integer,
    token      uuid,
    seconds    float8,
    max_bytes  integer,
    others     text,
    suspects   boolean,
    first      text[],
    after      text,
    reads      integer
) RETURNS TABLE (
    id        uuid,
    step      text,
    tried     integer,
    claims    integer,
    size      integer,
    due       float8,
    trace     text,
    queue     text,
    group_id  bigint,
    limit_key text,
    failures  integer
) LANGUAGE plpgsql AS $$
#variable_conflict use_column
DECLARE
    low      constant text COLLATE "C" := limit_name || ' ';
    high     constant text COLLATE "C" := limit_name || '!';
    rule     pg_task_limits;
    present  timestamptz;
    keys     text[];
    free     integer[];
    failed   integer[];
    turns    float8[];
    news     boolean[];
    base     float8;
    ready_from timestamptz;
    weights  float8;
    last     text;
    "full"   integer;
BEGIN
    IF NOT pg_try_advisory_xact_lock(1886610803, hashtext(current_schema() || '.' || limit_name)) THEN
        RETURN QUERY SELECT NULL::uuid, after, 1, 0, NULL::integer, NULL::float8, NULL::text, NULL::text, NULL::bigint,
            NULL::text, NULL::integer;
        RETURN;
    END IF;
    present := clock_timestamp();
    SELECT * INTO rule FROM pg_task_limits WHERE name = limit_name;
    IF rule.name IS NULL THEN
        rule.is_shared := true;  -- its code and its row are gone: nothing limits these tasks any more
    END IF;

    WITH RECURSIVE walk AS (
        (
            SELECT limit_key
            FROM pg_task
            WHERE limit_key >= low
              AND limit_key > coalesce(after, '')
              AND limit_key < high
              AND wakeup_at = 'infinity' AND locked_by IS NULL AND error IS NULL
            ORDER BY limit_key
            LIMIT 1
        )
        UNION ALL
        SELECT following.limit_key
        FROM walk
        CROSS JOIN LATERAL (
            SELECT limit_key
            FROM pg_task
            WHERE limit_key > walk.limit_key
              AND limit_key < high
              AND wakeup_at = 'infinity' AND locked_by IS NULL AND error IS NULL
            ORDER BY limit_key
            LIMIT 1
        ) AS following
    ),
    walked AS (SELECT limit_key FROM walk LIMIT reads)
    SELECT array_agg(limit_key), CASE WHEN count(*) >= reads THEN max(limit_key) END
    INTO keys, last
    FROM walked;
    keys := first || array(SELECT key FROM unnest(keys) AS key WHERE key <> ALL (first));

    -- What each key allows now; and, of those that allow nothing, when that may change.
    WITH looked AS MATERIALIZED (
        SELECT
            walked.limit_key,
            walked.nth,
            coalesce(state.failures, 0) AS failures,
            coalesce(rule.failures <= state.failures, false) AS is_probing,
            CASE WHEN rule.concurrency IS NOT NULL OR rule.failures <= state.failures THEN (
                SELECT count(*)
                FROM (
                    SELECT
                    FROM pg_task
                    WHERE limit_key = walked.limit_key
                      AND wakeup_at = 'infinity' AND locked_by IS NOT NULL
                    LIMIT greatest(rule.concurrency, 1)
                ) AS held
            ) ELSE 0 END AS held,
            greatest(rule.paused_until, state.paused_until) AS paused_until,
            floor(
                rule.burst
                - rule.rate * greatest(0, extract(epoch FROM state.next_at) - extract(epoch FROM present))::float8
                + 1e-6
            ) AS starts,
            state.next_at - make_interval(secs => (rule.burst - 1) / rule.rate) AS starts_at,
            state.cost_next_at - make_interval(secs => rule.cost_burst / rule.cost_rate) AS pays_at,
            rule.is_strict AND EXISTS (
                SELECT
                FROM pg_task
                WHERE limit_key = walked.limit_key
                  AND wakeup_at < 'infinity'
            ) AS is_behind,
            CASE WHEN rule.is_shared AND state.turn_at > present - interval '1 second' THEN state.turns END AS turns,
            coalesce(state.turn_at < present - interval '0.5 seconds', true) AS is_new
        FROM unnest(keys) WITH ORDINALITY AS walked (limit_key, nth)
        LEFT JOIN LATERAL (
            SELECT *
            FROM pg_task_limit_keys
            WHERE limit_key = walked.limit_key
            OFFSET 0
        ) AS state ON true
    ),
    allowed AS MATERIALIZED (
        SELECT
            limit_key,
            nth,
            failures,
            CASE
                WHEN is_behind OR paused_until > present OR pays_at >= present THEN 0
                ELSE greatest(0, least(
                    most::float8,
                    starts,
                    rule.concurrency - held,
                    CASE WHEN is_probing THEN 1 - held END
                ))
            END::integer AS free,
            greatest(
                CASE WHEN paused_until > present THEN paused_until END,
                CASE WHEN starts < 1 THEN starts_at END,
                CASE WHEN pays_at >= present THEN pays_at END
            ) AS ready_at,
            turns,
            is_new
        FROM looked
    )
    SELECT
        array_agg(limit_key ORDER BY nth) FILTER (WHERE allowed.free > 0),
        array_agg(allowed.free ORDER BY nth) FILTER (WHERE allowed.free > 0),
        array_agg(allowed.failures ORDER BY nth) FILTER (WHERE allowed.free > 0),
        array_agg(allowed.turns ORDER BY nth) FILTER (WHERE allowed.free > 0),
        array_agg(allowed.is_new ORDER BY nth) FILTER (WHERE allowed.free > 0),
        coalesce(min(allowed.turns) FILTER (WHERE allowed.free > 0), 0),
        min(ready_at),
        sum(coalesce((rule.weights ->> substr(limit_key, length(low) + 1))::float8, 1)) FILTER (WHERE allowed.free > 0),
        count(*) FILTER (WHERE allowed.free = 0 AND ready_at IS NULL)
    INTO keys, free, failed, turns, news, base, ready_from, weights, "full"
    FROM allowed;

    -- The lanes of each key, and the first task of each.
    RETURN QUERY
    WITH open AS MATERIALIZED (
        SELECT
            open.*,
            coalesce((rule.weights ->> substr(open.limit_key, length(low) + 1))::float8, 1) AS weight,
            greatest(open.turns, base) AS turn
        FROM unnest(keys, free, failed, turns, news) WITH ORDINALITY
            AS open (limit_key, free, failures, turns, is_new, nth)
    ),
    lanes AS MATERIALIZED (
        SELECT open.*, lane.queue, lane.priority, lane.limit_at AS first_at, min(lane.limit_at) OVER (PARTITION BY open.nth) AS oldest
        FROM open
        CROSS JOIN LATERAL (
            WITH RECURSIVE lane AS (
                (
                    SELECT queue, priority, limit_at
                    FROM pg_task
                    WHERE limit_key = open.limit_key
                      AND wakeup_at = 'infinity' AND locked_by IS NULL AND error IS NULL
                    ORDER BY queue, priority, limit_at
                    LIMIT 1
                )
                UNION ALL
                SELECT following.*
                FROM lane
                CROSS JOIN LATERAL (
                    (
                        SELECT queue, priority, limit_at
                        FROM pg_task
                        WHERE limit_key = open.limit_key
                          AND queue = lane.queue
                          AND priority > lane.priority
                          AND wakeup_at = 'infinity' AND locked_by IS NULL AND error IS NULL
                        ORDER BY priority, limit_at
                        LIMIT 1
                    )
                    UNION ALL
                    (
                        SELECT queue, priority, limit_at
                        FROM pg_task
                        WHERE limit_key = open.limit_key
                          AND queue > lane.queue
                          AND wakeup_at = 'infinity' AND locked_by IS NULL AND error IS NULL
                        ORDER BY queue, priority, limit_at
                        LIMIT 1
                    )
                    LIMIT 1
                ) AS following
            )
            SELECT * FROM lane
        ) AS lane
    ),
    seen AS MATERIALIZED (
        SELECT lanes.nth, lanes.turn + task.rank / lanes.weight AS turn, task.id, lanes.priority, task.limit_at
        FROM lanes
        CROSS JOIN LATERAL (
            SELECT known.id, known.limit_at, row_number() OVER () AS rank
            FROM (
                SELECT
                    pg_task.id,
                    limit_at,
                    (suspects OR claims = 0)
                        AND (others IS NULL OR left(step, 2000) || coalesce(E'\x01' || key, '') !~ others) AS fits
                FROM pg_task
                WHERE limit_key = lanes.limit_key
                  AND queue = lanes.queue
                  AND priority = lanes.priority
                  AND wakeup_at = 'infinity' AND locked_by IS NULL AND error IS NULL
                  AND limit_at <= present
                ORDER BY limit_at
                LIMIT CASE WHEN rule.is_strict THEN 1 ELSE 5000 END
            ) AS known
            WHERE known.fits
            LIMIT least(lanes.free, ceil(2 * most * lanes.weight / weights))
        ) AS task
        WHERE (served IS NULL OR lanes.queue = ANY (served))
          AND lanes.queue <> ALL (skipped)
          AND lanes.first_at <= present
          AND (rule.is_strict IS NOT TRUE OR lanes.first_at = lanes.oldest)
    ),
    picked AS MATERIALIZED (
        SELECT locked.id, locked.cost, turns.nth
        FROM (
            SELECT *
            FROM (
                SELECT seen.*, row_number() OVER (PARTITION BY nth ORDER BY priority DESC, limit_at) AS place
                FROM seen
            ) AS ranked
            WHERE place <= (SELECT free FROM open WHERE open.nth = ranked.nth)
            ORDER BY priority DESC, CASE WHEN rule.is_shared THEN turn END, limit_at, nth
            LIMIT 2 * most
        ) AS turns
        CROSS JOIN LATERAL (
            SELECT pg_task.id, limit_cost AS cost
            FROM pg_task
            WHERE pg_task.id = turns.id
              AND coalesce(locked_by::text, error) IS NULL
              AND wakeup_at = 'infinity'
            FOR NO KEY UPDATE SKIP LOCKED
        ) AS locked
        LIMIT most
    ),
    taken AS (
        UPDATE pg_task AS task
        SET locked_by = token,
            lock_expires_at = clock_timestamp() + make_interval(secs => seconds),
            claims = least(task.claims, 1000000) + 1,
            position = 0
        FROM set_config('synchronous_commit', 'off', true)
        WHERE task.id = ANY (ARRAY (SELECT picked.id FROM picked))
        RETURNING task.*
    ),
    counted AS (
        INSERT INTO pg_task_limit_keys AS state (limit_key, next_at, cost_next_at, turns, turn_at)
        SELECT
            open.limit_key,
            CASE WHEN rule.rate IS NOT NULL THEN
                present + make_interval(secs => least(got.tasks / rule.rate, 31536000))
            END,
            CASE WHEN rule.cost_rate IS NOT NULL THEN
                present + make_interval(secs => least(coalesce(got.cost, 0) / rule.cost_rate, 31536000))
            END,
            CASE WHEN rule.is_shared THEN open.turn + coalesce(got.tasks, 0) / open.weight END,
            CASE WHEN rule.is_shared THEN present END
        FROM open
        LEFT JOIN (SELECT nth, count(*) AS tasks, sum(cost) AS cost FROM picked GROUP BY nth) AS got ON got.nth = open.nth
        WHERE (rule.rate IS NOT NULL OR rule.cost_rate IS NOT NULL OR rule.is_shared)
          AND (got.tasks IS NOT NULL OR (rule.is_shared AND open.is_new))
        ORDER BY open.limit_key
        ON CONFLICT (limit_key) DO UPDATE
        SET next_at = coalesce(greatest(state.next_at, present) + (EXCLUDED.next_at - present), state.next_at),
            cost_next_at = coalesce(
                greatest(state.cost_next_at, present) + (EXCLUDED.cost_next_at - present), state.cost_next_at
            ),
            turns = EXCLUDED.turns,
            turn_at = EXCLUDED.turn_at
        RETURNING limit_key
    ),
    later AS (
        SELECT min(CASE WHEN lanes.first_at > present THEN lanes.first_at END) AS next_at
        FROM lanes
        WHERE (served IS NULL OR lanes.queue = ANY (served))
          AND lanes.queue <> ALL (skipped)
    )
    SELECT
        NULL::uuid,
        last,
        0,
        "full",
        NULL::integer,
        greatest(0, extract(epoch FROM least(ready_from, later.next_at)) - extract(epoch FROM present))::float8,
        NULL::text,
        NULL::text,
        NULL::bigint,
        NULL::text,
        NULL::integer
    FROM later
    UNION ALL
    SELECT
        taken.id,
        CASE WHEN octet_length(taken.step) <= max_bytes THEN taken.step END,
        taken.tried,
        taken.claims,
        CASE
            WHEN octet_length(taken.step) > max_bytes THEN octet_length(taken.step)
            WHEN taken.expires_at < present AND taken.claims = 1 AND taken.tried = 0 THEN -1
        END,
        date_part('epoch', taken.limit_at),
        taken.trace,
        taken.queue,
        taken.group_id::bigint,
        taken.limit_key,
        CASE
            WHEN rule.failures IS NULL THEN -1
            ELSE (SELECT open.failures FROM open WHERE open.limit_key = taken.limit_key)
        END
    FROM taken;
END
$$;

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
