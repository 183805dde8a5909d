"""The tables of the Rust crate pg_task and its statements, in our own words, from its documented behaviour."""

from __future__ import annotations

from datetime import datetime, timedelta
from typing import Any
from uuid import UUID, uuid4

STEP = '{"Greeter":{"ReadName":{"filename":"name.txt"}}}'
LATER = timedelta(hours=1)


COLUMNS = """
    id uuid PRIMARY KEY DEFAULT gen_random_uuid(), step text NOT NULL,
    wakeup_at timestamptz NOT NULL DEFAULT now(), tried int NOT NULL DEFAULT 0, error text,
    created_at timestamptz NOT NULL DEFAULT now(), updated_at timestamptz NOT NULL DEFAULT now()
"""
AVAILABLE_AT = "CASE WHEN locked_by IS NOT NULL THEN GREATEST(wakeup_at, lock_expires_at) ELSE wakeup_at END"

CRATE_FUNCTIONS = """
    CREATE FUNCTION pg_task_notify_on_change() RETURNS trigger LANGUAGE plpgsql AS
        $$ BEGIN PERFORM pg_notify('pg_task_changed', ''); RETURN NEW; END $$;
    CREATE FUNCTION pg_task_before_update_refresh_updated_at() RETURNS trigger LANGUAGE plpgsql AS
        $$ BEGIN NEW.updated_at = now(); RETURN NEW; END $$;
    CREATE TRIGGER pg_task_before_update_refresh_updated_at_trigger BEFORE UPDATE ON pg_task
        FOR EACH ROW EXECUTE FUNCTION pg_task_before_update_refresh_updated_at();
"""
CRATE_0_2 = f"""
    CREATE TABLE pg_task ({COLUMNS}, is_running boolean NOT NULL DEFAULT false);
    CREATE INDEX pg_task_wakeup_at_idx ON pg_task (wakeup_at);
    {CRATE_FUNCTIONS}
    CREATE TRIGGER pg_task_changed AFTER INSERT OR UPDATE ON pg_task
        FOR EACH ROW EXECUTE FUNCTION pg_task_notify_on_change();
"""
CRATE_1_0 = f"""
    CREATE TABLE pg_task ({COLUMNS}, locked_by uuid, lock_expires_at timestamptz,
        CONSTRAINT pg_task_lease_state_check CHECK ((locked_by IS NULL AND lock_expires_at IS NULL)
            OR (locked_by IS NOT NULL AND lock_expires_at IS NOT NULL)));
    CREATE INDEX pg_task_locked_by_idx ON pg_task (locked_by) WHERE locked_by IS NOT NULL AND error IS NULL;
    CREATE INDEX pg_task_next_available_at_idx ON pg_task (({AVAILABLE_AT})) WHERE error IS NULL;
    {CRATE_FUNCTIONS}
    CREATE FUNCTION pg_task_notify_on_error() RETURNS trigger LANGUAGE plpgsql AS
        $$ BEGIN PERFORM pg_notify('pg_task_error', NEW.id::text); RETURN NEW; END $$;
    CREATE TRIGGER pg_task_changed_insert AFTER INSERT ON pg_task
        FOR EACH ROW EXECUTE FUNCTION pg_task_notify_on_change();
    CREATE TRIGGER pg_task_changed_update AFTER UPDATE ON pg_task FOR EACH ROW
        WHEN ((OLD.step, OLD.wakeup_at, OLD.tried, OLD.error, OLD.locked_by)
            IS DISTINCT FROM (NEW.step, NEW.wakeup_at, NEW.tried, NEW.error, NEW.locked_by))
        EXECUTE FUNCTION pg_task_notify_on_change();
    CREATE TRIGGER pg_task_error_insert AFTER INSERT ON pg_task
        FOR EACH ROW WHEN (NEW.error IS NOT NULL) EXECUTE FUNCTION pg_task_notify_on_error();
    CREATE TRIGGER pg_task_error_update AFTER UPDATE OF error ON pg_task FOR EACH ROW
        WHEN (OLD.error IS NULL AND NEW.error IS NOT NULL) EXECUTE FUNCTION pg_task_notify_on_error();
"""
OUR_INDEXES = {
    *("pg_task_pkey", "pg_task_ready_idx", "pg_task_lease_idx", "pg_task_parked_idx", "pg_task_key_idx"),
    *("pg_task_behind_idx", "pg_task_limited_idx", "pg_task_limit_held_idx", "pg_task_limit_before_idx"),
    *("pg_task_group_added_idx", "pg_task_group_parked_idx"),
}
OUR_TRIGGERS = {
    *("pg_task_inserted", "pg_task_rescheduled", "pg_task_inserted_parked", "pg_task_parked", "pg_task_touched"),
    *("pg_task_run_parked", "pg_task_run_revived"),
}
OUR_FUNCTIONS = {
    *("pg_task_notify", "pg_task_notify_parked", "pg_task_touch", "pg_task_stop", "pg_task_paused_until"),
    *(
        "pg_task_check_json",
        "pg_task_check_name",
        "pg_task_claim_limited",
        "pg_task_estimate",
        "pg_task_family",
        "pg_task_has",
        "pg_task_hold_limits",
        "pg_task_is_printable",
        "pg_task_lanes",
        "pg_task_lock_limit_key",
        "pg_task_may_hold_limit",
        "pg_task_note_limits",
        "pg_task_notify_paused",
        "pg_task_rescale_limit",
        "pg_task_run_parked",
        "pg_task_run_revived",
        "pg_task_scoped_key",
        "pg_task_workflow",
    ),
}


class RustWorker:
    """The statements of pg_task 1.0, as its worker sends them."""

    def __init__(self, connection: Any) -> None:
        self.db = connection
        self.me = uuid4()

    async def schedule(self, step: str, at: datetime) -> UUID:
        sql = "INSERT INTO pg_task (step, wakeup_at) VALUES ($1, $2) RETURNING id"
        return UUID(str(await self.db.fetchval(sql, step, at)))

    async def enqueue(self, step: str = STEP, after: timedelta = timedelta(0)) -> UUID:
        return await self.schedule(step, await self.db.fetchval("SELECT now()") + after)

    async def claim(self) -> Any | None:
        """Finds a ready row, then finds it again and leases it."""
        ready = f"""
            SELECT id, step, tried FROM pg_task WHERE error IS NULL AND ({AVAILABLE_AT}) <= now()
            ORDER BY {AVAILABLE_AT} LIMIT 1 FOR UPDATE SKIP LOCKED
        """
        async with self.db.transaction():
            if await self.db.fetchrow(ready) is None:
                return None
        async with self.db.transaction():
            row = await self.db.fetchrow(ready)
            if row is not None:
                until = await self.db.fetchval(
                    "UPDATE pg_task SET locked_by = $2, lock_expires_at = now() + $3::interval WHERE id = $1"
                    " RETURNING lock_expires_at",
                    row["id"], self.me, timedelta(minutes=1),
                )  # fmt: skip
                assert until is not None
            return row

    async def next_available_at(self) -> datetime | None:
        sql = f"SELECT {AVAILABLE_AT} FROM pg_task WHERE error IS NULL ORDER BY 1 LIMIT 1"
        at: datetime | None = await self.db.fetchval(sql)
        return at

    async def beat(self, *ids: UUID) -> set[UUID]:
        rows = await self.db.fetch(
            "UPDATE pg_task SET lock_expires_at = now() + $2::interval WHERE locked_by = $1 AND id = ANY($3)"
            " AND lock_expires_at > now() AND error IS NULL RETURNING id, lock_expires_at",
            self.me, timedelta(minutes=1), ids,
        )  # fmt: skip
        return {row["id"] for row in rows}

    async def complete(self, task: UUID) -> bool:
        return await self._fenced("DELETE FROM pg_task", task)

    async def next_step(self, task: UUID, step: str, at: datetime) -> bool:
        head = "UPDATE pg_task SET tried = 0, step = $3, wakeup_at = $4, {free}"
        return await self._fenced(head, task, step, at)

    async def retry(self, task: UUID, at: datetime) -> bool:
        head = "UPDATE pg_task SET tried = tried + 1, wakeup_at = $3, {free}"
        return await self._fenced(head, task, at)

    async def park(self, task: UUID, error: str) -> bool:
        head = "UPDATE pg_task SET tried = tried + 1, error = $3, wakeup_at = now(), {free}"
        return await self._fenced(head, task, error)

    async def park_undecodable(self, task: UUID, error: str) -> bool:
        free = "locked_by = NULL, lock_expires_at = NULL"
        sql = f"UPDATE pg_task SET error = $2, wakeup_at = now(), {free} WHERE id = $1 RETURNING step"
        return await self.db.fetchval(sql, task, error) is not None

    async def _fenced(self, head: str, task: UUID, *values: Any) -> bool:
        head = head.format(free="locked_by = NULL, lock_expires_at = NULL")
        fence = "WHERE id = $1 AND locked_by = $2 AND lock_expires_at > now()"
        return str(await self.db.execute(f"{head} {fence}", task, self.me, *values)).endswith(" 1")


SHAPES = {
    "fresh": (None, False),
    "adopted from 0.2": (CRATE_0_2, False),
    "adopted from 1.0": (CRATE_1_0, False),
    "kept 1.0": (CRATE_1_0, True),
}
"""How a table came about: the crate's version, and whether its objects were kept."""
