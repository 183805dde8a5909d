-- A turn runs short steps while its transaction holds their rows (pgtask/_worker/hold.py). With this version it also runs
-- steps under limits. While it does, no row tells that they run; so it has locked their keys, and no claim and no other turn
-- starts anything of these. Whatever of them goes on after the turn has its lease by then, which the next claim counts.
--
-- 020 had pg_task_claim_limited before.

-- Return whether turns may run steps under a limit. Those of a rate, a cost, turns of keys or a strict order start by a claim,
-- which keeps the account of these.
CREATE OR REPLACE FUNCTION pg_task_may_hold_limit(rate float8, cost_rate float8, is_shared boolean, is_strict boolean)
RETURNS boolean LANGUAGE sql IMMUTABLE AS $$
    SELECT rate IS NULL AND cost_rate IS NULL AND NOT is_shared AND NOT is_strict
$$;

-- Lock the key of a limit until the end of the transaction, unless another one has it. Return whether it did. Keys share 4,096
-- locks, so that those of all turns together have room in the server's table of locks.
CREATE OR REPLACE FUNCTION pg_task_lock_limit_key(key text) RETURNS boolean LANGUAGE sql AS $$
    SELECT pg_try_advisory_xact_lock(1886610804, hashtext(current_schema() || '.' || key) & 4095)
$$;

-- Lock those of the keys of limits that a turn may run steps of, until the end of its transaction. For each it returns how
-- many more may run at once; 0 if another turn or claim has the key just now; -1 if its steps have to wait for a claim.
--
-- Plan: a probe of pg_task_limit_held_idx and of the primary key of pg_task_limit_keys for each key. The counts have a
-- snapshot that is taken after the locks; that needs READ COMMITTED.
CREATE OR REPLACE FUNCTION pg_task_hold_limits(keys text[]) RETURNS integer[] LANGUAGE plpgsql AS $$
DECLARE
    locked boolean[];
BEGIN
    locked := ARRAY (
        SELECT CASE WHEN pg_task_may_hold_limit(rate, cost_rate, is_shared, is_strict) THEN pg_task_lock_limit_key(key) END
        FROM unnest(keys) WITH ORDINALITY AS wanted (key, nth)
        LEFT JOIN pg_task_limits AS rule ON rule.name = split_part(key, ' ', 1)
        ORDER BY nth
    );
    RETURN ARRAY (
        SELECT CASE
            WHEN NOT is_ours THEN 0
            WHEN is_ours
             AND coalesce(rule.paused_until <= clock_timestamp(), true)
             AND (rule.concurrency IS NULL OR rule.concurrency > held.tasks)
             AND NOT EXISTS (
                SELECT
                FROM pg_task_limit_keys
                WHERE limit_key = wanted.key
                  AND (paused_until > clock_timestamp() OR failures > 0)
             ) THEN coalesce(rule.concurrency - held.tasks, 1000000)
            ELSE -1
        END::integer
        FROM unnest(keys, locked) WITH ORDINALITY AS wanted (key, is_ours, nth)
        LEFT JOIN pg_task_limits AS rule ON rule.name = split_part(key, ' ', 1)
        LEFT JOIN LATERAL (
            SELECT count(*) AS tasks
            FROM (
                SELECT
                FROM pg_task
                WHERE limit_key = wanted.key
                  AND wakeup_at = 'infinity' AND locked_by IS NOT NULL
                LIMIT rule.concurrency
            ) AS held
        ) AS held ON true
        ORDER BY nth
    );
END
$$;

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
-- One claim of a limit runs at a time, and none looks at a key that a turn has (pg_task_hold_limits). Each statement of this
-- function has a snapshot of its own, taken after the locks, so it sees all that others have leased before. That needs READ
-- COMMITTED, which the sessions of workers set.
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
    in_turns integer := 0;
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
    IF pg_task_may_hold_limit(rule.rate, rule.cost_rate, rule.is_shared, rule.is_strict) THEN
        SELECT array_agg(key ORDER BY nth) FILTER (WHERE is_free), count(*) FILTER (WHERE NOT is_free)
        INTO keys, in_turns
        FROM (
            SELECT key, nth, pg_task_lock_limit_key(key) AS is_free
            FROM unnest(keys) WITH ORDINALITY AS one (key, nth)
        ) AS locked;
    END IF;

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
        "full" + in_turns,
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
