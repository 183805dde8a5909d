-- Groups: tasks that belong together, with progress, results and a step that is enqueued once at the end.
--
-- A task is a member by its column `group_id`. Those with which a group was started have ids from `first_task` to
-- `last_task`, where the primary key finds them, so that they cost no other index. For those that were added later, and for
-- steps with a time or key of their own, `group_id` is the id of the group times -1, and an index has these alone. The rows
-- are the truth: a group is over when none of it waits or runs.
--
-- What has left the table is counted in `pg_task_group_counts`, in a row for each session that writes outcomes, so that no
-- session waits for the row of another one; such counts change with the rows that they count, in one statement.
DO $$
BEGIN
    IF NOT EXISTS (
        SELECT FROM pg_attribute
        WHERE attrelid = 'pg_task'::regclass AND attname = 'group_id' AND NOT attisdropped
    ) THEN
        ALTER TABLE pg_task ADD COLUMN group_id bigint;
    END IF;
    IF to_regclass('pg_task_groups') IS NULL THEN
        CREATE TABLE pg_task_groups (
            id            bigint      GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
            name          text        NOT NULL,
            state         text        NOT NULL DEFAULT 'open',
            total         bigint      NOT NULL DEFAULT 0,
            results       boolean     NOT NULL DEFAULT false,
            on_parked     text        NOT NULL DEFAULT 'wait',
            then_step     text,
            then_queue    text,
            then_priority smallint,
            then_task     uuid,
            first_task    uuid,
            last_task     uuid,
            started_at    timestamptz NOT NULL DEFAULT now(),
            cancelled_at  timestamptz,
            ended_at      timestamptz,
            CONSTRAINT pg_task_groups_name_key UNIQUE (name),
            CONSTRAINT pg_task_groups_state_check CHECK (state IN ('open', 'cancelling', 'ended', 'cancelled')),
            CONSTRAINT pg_task_groups_on_parked_check CHECK (on_parked IN ('wait', 'go on'))
        ) WITH (fillfactor = 50);
        GRANT SELECT ON pg_task_groups TO PUBLIC;
    END IF;
    IF to_regclass('pg_task_group_counts') IS NULL THEN
        CREATE TABLE pg_task_group_counts (
            group_id  bigint  NOT NULL,
            slot      integer NOT NULL,
            done      bigint  NOT NULL DEFAULT 0,
            added     bigint  NOT NULL DEFAULT 0,
            parked    bigint  NOT NULL DEFAULT 0,
            cancelled bigint  NOT NULL DEFAULT 0,
            PRIMARY KEY (group_id, slot)
        ) WITH (
            fillfactor = 10,
            autovacuum_vacuum_scale_factor = 0,
            autovacuum_vacuum_threshold = 1000,
            autovacuum_vacuum_cost_delay = 0
        );
    END IF;
    IF to_regclass('pg_task_group_results') IS NULL THEN
        CREATE TABLE pg_task_group_results (
            group_id bigint NOT NULL,
            task_id  uuid   NOT NULL,
            value    text   NOT NULL,
            PRIMARY KEY (group_id, task_id)
        );
    END IF;
END
$$;

-- The members that were added and wait or run, and all members that are parked.
CREATE INDEX IF NOT EXISTS pg_task_group_added_idx ON pg_task (group_id, id) WHERE group_id < 0 AND error IS NULL;
CREATE INDEX IF NOT EXISTS pg_task_group_parked_idx ON pg_task (abs(group_id), id) WHERE group_id IS NOT NULL AND error IS NOT NULL;

-- The groups that have not ended: few, however many there were.
CREATE INDEX IF NOT EXISTS pg_task_groups_open_idx ON pg_task_groups (id) WHERE ended_at IS NULL;
