-- List the objects that are missing or disabled, of those that the migrations have made up to the applied version: a
-- row for each. A dump of some of the tables has no functions, for example, and its restore no triggers. Rights do not
-- count: they are up to the administrator.
--
-- One statement for the boot of every worker, after state.sql: it reads the catalog. repair.sql uses the definitions to
-- make again the objects that the migrations cannot.
WITH here AS (
    SELECT relnamespace AS schema, relnamespace::regnamespace::text AS name
    FROM pg_class
    WHERE oid = to_regclass('pg_task')
),
wanted (since, kind, on_table, name, definition) AS (
    VALUES
        (3, 'table', 'pg_task_runs', 'pg_task_runs', ''),
        (3, 'table', 'pg_task_checkpoints', 'pg_task_checkpoints', ''),
        (3, 'table', 'pg_task_signals', 'pg_task_signals', ''),
        (4, 'table', 'pg_task_archive', 'pg_task_archive', ''),
        (7, 'table', 'pg_task_stops', 'pg_task_stops', ''),
        (15, 'table', 'pg_task_pauses', 'pg_task_pauses', ''),
        (16, 'table', 'pg_task_actions', 'pg_task_actions', ''),
        (18, 'table', 'pg_task_schedules', 'pg_task_schedules', ''),
        (20, 'table', 'pg_task_limits', 'pg_task_limits', ''),
        (20, 'table', 'pg_task_limit_keys', 'pg_task_limit_keys', ''),
        (19, 'table', 'pg_task_groups', 'pg_task_groups', ''),
        (19, 'table', 'pg_task_group_counts', 'pg_task_group_counts', ''),
        (19, 'table', 'pg_task_group_results', 'pg_task_group_results', ''),

        (2, 'index', 'pg_task', 'pg_task_ready_idx', ''),
        (2, 'index', 'pg_task', 'pg_task_lease_idx', ''),
        (2, 'index', 'pg_task', 'pg_task_parked_idx', ''),
        (2, 'index', 'pg_task', 'pg_task_key_idx', ''),
        (3, 'index', 'pg_task_runs', 'pg_task_runs_name_idx', ''),
        (3, 'index', 'pg_task_runs', 'pg_task_runs_parent_idx', ''),
        (3, 'index', 'pg_task_signals', 'pg_task_signals_run_idx', ''),
        (4, 'index', 'pg_task_archive', 'pg_task_archive_finished_idx', ''),
        (12, 'index', 'pg_task', 'pg_task_behind_idx', ''),
        (18, 'index', 'pg_task_schedules', 'pg_task_schedules_look_idx', ''),
        (20, 'index', 'pg_task', 'pg_task_limited_idx', ''),
        (20, 'index', 'pg_task', 'pg_task_limit_held_idx', ''),
        (20, 'index', 'pg_task', 'pg_task_limit_before_idx', ''),
        (24, 'index', 'pg_task_limit_keys', 'pg_task_limit_paused_idx', ''),
        (19, 'index', 'pg_task', 'pg_task_group_added_idx', ''),
        (19, 'index', 'pg_task', 'pg_task_group_parked_idx', ''),
        (19, 'index', 'pg_task_groups', 'pg_task_groups_open_idx', ''),

        (1, 'constraint', 'pg_task', 'pg_task_lease_state_check', 'CHECK ((locked_by IS NULL) = (lock_expires_at IS NULL))'),
        (3, 'constraint', 'pg_task_runs', 'pg_task_runs_pkey', 'PRIMARY KEY (id)'),
        (3, 'constraint', 'pg_task_runs', 'pg_task_runs_state_check', 'CHECK (state IN (''SUCCESS'', ''ERROR'', ''CANCELLED''))'),
        (3, 'constraint', 'pg_task_checkpoints', 'pg_task_checkpoints_pkey', 'PRIMARY KEY (run, number)'),
        (3, 'constraint', 'pg_task_signals', 'pg_task_signals_pkey', 'PRIMARY KEY (id)'),
        (4, 'constraint', 'pg_task_archive', 'pg_task_archive_pkey', 'PRIMARY KEY (id, finished_at)'),
        (1, 'constraint', 'pg_task_schema', 'pg_task_schema_pkey', 'PRIMARY KEY (version)'),
        (7, 'constraint', 'pg_task_stops', 'pg_task_stops_pkey', 'PRIMARY KEY (id)'),
        (15, 'constraint', 'pg_task_pauses', 'pg_task_pauses_pkey', 'PRIMARY KEY (kind, name)'),
        (
            21, 'constraint', 'pg_task_pauses', 'pg_task_pauses_kind_check',
            'CHECK (kind IN (''queue'', ''task'', ''step'', ''key''))'
        ),
        (16, 'constraint', 'pg_task_actions', 'pg_task_actions_pkey', 'PRIMARY KEY (id)'),
        (
            16, 'constraint', 'pg_task_actions', 'pg_task_actions_state_check',
            'CHECK (state IN (''running'', ''done'', ''stopped'', ''failed''))'
        ),
        (18, 'constraint', 'pg_task_schedules', 'pg_task_schedules_pkey', 'PRIMARY KEY (name)'),
        (
            18, 'constraint', 'pg_task_schedules', 'pg_task_schedules_missed_check',
            'CHECK (missed IN (''skip'', ''latest'', ''all''))'
        ),
        (
            18, 'constraint', 'pg_task_schedules', 'pg_task_schedules_overlap_check',
            'CHECK (overlap IN (''skip'', ''allow''))'
        ),
        (20, 'constraint', 'pg_task_limits', 'pg_task_limits_pkey', 'PRIMARY KEY (name)'),
        (
            20, 'constraint', 'pg_task_limits', 'pg_task_limits_check',
            'CHECK (concurrency >= 0 AND rate > 0 AND burst >= 1 AND cost_rate > 0 AND cost_burst > 0 AND failures > 0 AND pause > 0)'
        ),
        (20, 'constraint', 'pg_task_limit_keys', 'pg_task_limit_keys_pkey', 'PRIMARY KEY (limit_key)'),
        (19, 'constraint', 'pg_task_groups', 'pg_task_groups_pkey', 'PRIMARY KEY (id)'),
        (19, 'constraint', 'pg_task_groups', 'pg_task_groups_name_key', 'UNIQUE (name)'),
        (
            19, 'constraint', 'pg_task_groups', 'pg_task_groups_state_check',
            'CHECK (state IN (''open'', ''cancelling'', ''ended'', ''cancelled''))'
        ),
        (19, 'constraint', 'pg_task_groups', 'pg_task_groups_on_parked_check', 'CHECK (on_parked IN (''wait'', ''go on''))'),
        (19, 'constraint', 'pg_task_group_counts', 'pg_task_group_counts_pkey', 'PRIMARY KEY (group_id, slot)'),
        (19, 'constraint', 'pg_task_group_results', 'pg_task_group_results_pkey', 'PRIMARY KEY (group_id, task_id)'),

        (
            1, 'default', 'pg_task', 'id',
            CASE WHEN current_setting('server_version_num')::integer < 180000 THEN 'gen_random_uuid()' ELSE 'uuidv7()' END
        ),
        (1, 'default', 'pg_task', 'wakeup_at', 'clock_timestamp()'),
        (1, 'default', 'pg_task', 'tried', '0'),
        (1, 'default', 'pg_task', 'created_at', 'now()'),
        (1, 'default', 'pg_task', 'updated_at', 'now()'),
        (1, 'default', 'pg_task', 'queue', '''default'''),
        (1, 'default', 'pg_task', 'priority', '0'),
        (1, 'default', 'pg_task', 'claims', '0'),
        (8, 'default', 'pg_task', 'position', '0'),
        (3, 'default', 'pg_task_runs', 'created_at', 'now()'),
        (3, 'default', 'pg_task_runs', 'waits_for', '0'),
        (3, 'default', 'pg_task_runs', 'awaited', 'false'),
        (3, 'default', 'pg_task_checkpoints', 'seconds', '0'),
        (3, 'default', 'pg_task_checkpoints', 'recorded_at', 'now()'),
        (5, 'default', 'pg_task_checkpoints', 'tried', '0'),
        (3, 'default', 'pg_task_signals', 'sent_at', 'now()'),
        (4, 'default', 'pg_task_archive', 'finished_at', 'now()'),
        (1, 'default', 'pg_task_schema', 'applied_at', 'now()'),
        (7, 'default', 'pg_task_stops', 'given_at', 'now()'),
        (7, 'default', 'pg_task_stops', 'given_by', 'session_user'),
        (15, 'default', 'pg_task_pauses', 'paused_at', 'now()'),
        (15, 'default', 'pg_task_pauses', 'paused_by', 'session_user'),
        (16, 'default', 'pg_task_actions', 'began_at', 'now()'),
        (16, 'default', 'pg_task_actions', 'tasks', '0'),
        (16, 'default', 'pg_task_actions', 'state', '''running'''),
        (18, 'default', 'pg_task_schedules', 'zone', '''UTC'''),
        (18, 'default', 'pg_task_schedules', 'queue', '''default'''),
        (18, 'default', 'pg_task_schedules', 'priority', '0'),
        (18, 'default', 'pg_task_schedules', 'missed', '''latest'''),
        (18, 'default', 'pg_task_schedules', 'max_missed', '1000'),
        (18, 'default', 'pg_task_schedules', 'overlap', '''skip'''),
        (18, 'default', 'pg_task_schedules', 'declared_at', 'now()'),
        (20, 'default', 'pg_task_limits', 'is_shared', 'false'),
        (20, 'default', 'pg_task_limits', 'is_strict', 'false'),
        (20, 'default', 'pg_task_limits', 'changed', '''{}'''),
        (20, 'default', 'pg_task_limits', 'updated_at', 'now()'),
        (20, 'default', 'pg_task_limit_keys', 'failures', '0'),
        (19, 'default', 'pg_task_groups', 'state', '''open'''),
        (19, 'default', 'pg_task_groups', 'total', '0'),
        (19, 'default', 'pg_task_groups', 'results', 'false'),
        (19, 'default', 'pg_task_groups', 'on_parked', '''wait'''),
        (19, 'default', 'pg_task_groups', 'started_at', 'now()'),
        (19, 'default', 'pg_task_group_counts', 'done', '0'),
        (19, 'default', 'pg_task_group_counts', 'added', '0'),
        (19, 'default', 'pg_task_group_counts', 'parked', '0'),
        (19, 'default', 'pg_task_group_counts', 'cancelled', '0'),

        (2, 'function', 'pg_task', 'pg_task_notify()', ''),
        (6, 'function', 'pg_task', 'pg_task_workflow(text)', ''),
        (6, 'function', 'pg_task', 'pg_task_paused_until(uuid)', ''),
        (6, 'function', 'pg_task', 'pg_task_run_parked()', 'pg_task_runs'),
        (6, 'function', 'pg_task', 'pg_task_run_revived()', 'pg_task_runs'),
        (7, 'function', 'pg_task', 'pg_task_notify_parked()', ''),
        (12, 'function', 'pg_task', 'pg_task_family(text)', ''),
        (12, 'function', 'pg_task', 'pg_task_scoped_key(text, text)', ''),
        (7, 'function', 'pg_task', 'pg_task_touch()', ''),
        (7, 'function', 'pg_task', 'pg_task_stop()', 'pg_task_stops'),
        (13, 'function', 'pg_task', 'pg_task_is_printable(text)', ''),
        (13, 'function', 'pg_task', 'pg_task_check_name(text,text)', 'search_path'),
        (13, 'function', 'pg_task', 'pg_task_check_json(text,json)', 'search_path'),
        (13, 'function', 'pg_task', 'pgtask_enqueue(text,json,text,text,bigint,timestamptz,interval)', 'search_path'),
        (13, 'function', 'pg_task', 'pgtask_signal(uuid,text,json)', 'search_path'),
        (13, 'function', 'pg_task', 'pgtask_cancel(uuid)', 'search_path'),
        (14, 'function', 'pg_task', 'pg_task_estimate(text)', ''),
        (14, 'function', 'pg_task', 'pg_task_lanes(text)', ''),
        (14, 'function', 'pg_task', 'pgtask_oldest_due(text)', 'search_path'),
        (15, 'function', 'pg_task_pauses', 'pg_task_notify_paused()', ''),
        (16, 'function', 'pg_task', 'pg_task_has(text,text[])', ''),
        (20, 'function', 'pg_task_limits', 'pg_task_rescale_limit()', ''),
        (
            20, 'function', 'pg_task_limits',
            'pg_task_note_limits(text[],integer[],boolean[],double precision[],double precision[])', ''
        ),
        (22, 'function', 'pg_task_limits', 'pg_task_may_hold_limit(double precision,double precision,boolean,boolean)', ''),
        (22, 'function', 'pg_task_limits', 'pg_task_lock_limit_key(text)', ''),
        (22, 'function', 'pg_task_limits', 'pg_task_hold_limits(text[])', ''),
        (
            22, 'function', 'pg_task_limits',
            'pg_task_claim_limited(text,text[],text[],integer,uuid,double precision,integer,text,boolean,text[],text,integer)', ''
        ),
        (24, 'function', 'pg_task', 'pgtask_depth(text)', 'search_path'),
        (24, 'function', 'pg_task', 'pgtask_backlog(text)', 'search_path'),

        (2, 'trigger', 'pg_task', 'pg_task_inserted', 'pg_task_notify'),
        (2, 'trigger', 'pg_task', 'pg_task_rescheduled', 'pg_task_notify'),
        (6, 'trigger', 'pg_task', 'pg_task_run_parked', 'pg_task_run_parked'),
        (6, 'trigger', 'pg_task', 'pg_task_run_revived', 'pg_task_run_revived'),
        (7, 'trigger', 'pg_task', 'pg_task_inserted_parked', 'pg_task_notify_parked'),
        (7, 'trigger', 'pg_task', 'pg_task_parked', 'pg_task_notify_parked'),
        (7, 'trigger', 'pg_task', 'pg_task_touched', 'pg_task_touch'),
        (15, 'trigger', 'pg_task_pauses', 'pg_task_paused', 'pg_task_notify_paused'),
        (20, 'trigger', 'pg_task_limits', 'pg_task_limits_changed', 'pg_task_notify_paused'),
        (20, 'trigger', 'pg_task_limits', 'pg_task_limit_rescaled', 'pg_task_rescale_limit')
),
placed AS (
    SELECT wanted.*, here.schema, here.name AS home, pg_class.oid AS relation
    FROM wanted
    CROSS JOIN here
    LEFT JOIN pg_class ON relnamespace = here.schema AND relname = wanted.on_table AND relkind = 'r'
    WHERE since <= (SELECT max(version) FROM pg_task_schema)
)
SELECT
    kind,
    on_table,
    name,
    definition,
    CASE kind
        WHEN 'default' THEN format('default of %s.%s', on_table, name)
        ELSE format('%s %s', kind, name)
    END AS label
FROM placed
WHERE (relation IS NOT NULL OR kind = 'table') -- a missing table includes all that is on it
  AND NOT CASE kind
    WHEN 'table' THEN relation IS NOT NULL
    WHEN 'index' THEN EXISTS (
        SELECT FROM pg_index
        JOIN pg_class ON pg_class.oid = indexrelid
        WHERE indrelid = relation AND indisvalid AND relname = placed.name
    )
    WHEN 'constraint' THEN EXISTS (
        SELECT FROM pg_constraint WHERE conrelid = relation AND conname = placed.name AND convalidated
    )
    WHEN 'default' THEN EXISTS (
        SELECT FROM pg_attribute WHERE attrelid = relation AND attname = placed.name AND atthasdef AND NOT attisdropped
    )
    -- The search_path of some must be our schema. One that runs by the rights of its owner works only if that may write.
    WHEN 'function' THEN EXISTS (
        SELECT FROM pg_proc
        WHERE oid = to_regprocedure(home || '.' || placed.name)
          AND (
              definition = ''
              OR (
                  format('search_path=%s, pg_temp', home) = ANY (proconfig)
                  AND (
                      definition = 'search_path'
                      OR (
                          prosecdef
                          AND has_table_privilege(proowner, relation, 'UPDATE')
                          AND coalesce(has_table_privilege(proowner, to_regclass(home || '.' || definition), 'INSERT'), true)
                      )
                  )
              )
          )
    )
    -- The argument of pg_task_notify has a form of its own, see 009.
    WHEN 'trigger' THEN EXISTS (
        SELECT FROM pg_trigger
        JOIN pg_proc ON pg_proc.oid = tgfoid
        WHERE tgrelid = relation
          AND tgname = placed.name
          AND tgenabled IN ('O', 'A')
          AND proname = definition
          AND pronamespace = placed.schema
          AND (
              proname <> 'pg_task_notify'
              OR tgnargs = 0
              OR encode(tgargs, 'escape') ~ '^(infinity|\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ)\\000$'
          )
    )
END
ORDER BY array_position('{table,function,trigger,index,constraint,default}'::text[], kind), on_table, name
