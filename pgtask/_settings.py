"""The table of settings: what each is called, how its text is read, and what help says of it.

Invariant: a value that was read is valid by itself; what only holds between two settings is for `config` to check.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import msgspec

from pgtask._dsn import check_dsn
from pgtask.policy import check_queue

__all__ = ["PREFIX", "SETTINGS", "Setting"]

PREFIX = "PGTASK_"
LEAST_STALL = 2  # seconds in which the loop of a worker is heard of four times, if it is well


class Setting(msgspec.Struct, frozen=True):
    """One setting: its name in `Config`, how its text is read, and what help says. The flag, the variable and the key
    of the file follow from the name."""

    name: str
    parse: Callable[[Any], Any]
    help: str
    metavar: str | None = None
    negated: bool = False  # the flag switches off: --no-listen sets listen to false

    @property
    def flag(self) -> str:
        return ("--no-" if self.negated else "--") + self.name.replace("_", "-")

    @property
    def variable(self) -> str:
        return PREFIX + ("NO_" if self.negated else "") + self.name.upper()

    @property
    def key(self) -> str:
        return ("no-" if self.negated else "") + self.name.replace("_", "-")

    @property
    def is_switch(self) -> bool:
        return self.parse is _switch


def _text(value: Any) -> str:
    if not isinstance(value, str) or not value:
        raise ValueError("expected a text")
    return value


def _whole(smallest: int) -> Callable[[Any], int]:
    def parse(value: Any) -> int:
        message = f"expected a whole number, {smallest} or more"
        if isinstance(value, (bool, float)):
            raise ValueError(message)
        try:
            number = int(value)
        except (TypeError, ValueError):
            raise ValueError(message) from None
        if not smallest <= number < 2**31:
            raise ValueError(message + (f", less than {2**31:,}" if number > 0 else ""))
        return number

    return parse


def _seconds(*, zero: bool, least: int = 0) -> Callable[[Any], float]:
    """With `least`, zero means never."""
    bound = f"{least} or more, or 0 for never" if least else "zero or more" if zero else "more than zero"

    def parse(value: Any) -> float:
        message = f"expected seconds, {bound}"
        if isinstance(value, bool):
            raise ValueError(message)
        try:
            number = float(value)
        except (TypeError, ValueError):
            raise ValueError(message) from None
        if not (least <= number < 1e9 or number == 0) or (number == 0 and not zero):
            raise ValueError(message + (f", less than {10**9:,}" if number >= 1e9 else ""))
        return number

    return parse


def _one_of(*choices: str) -> Callable[[Any], str]:
    def parse(value: Any) -> str:
        if str(value).lower() not in choices:
            raise ValueError("expected one of " + ", ".join(choices))
        return str(value).lower()

    return parse


def _switch(value: Any) -> bool:
    if isinstance(value, bool):
        return value
    match str(value).strip().lower():
        case "1" | "true" | "yes" | "on":
            return True
        case "0" | "false" | "no" | "off" | "":
            return False
    raise ValueError("expected true or false")


def _queues(value: Any) -> tuple[str, ...]:
    values = [value] if isinstance(value, str) else value
    if not isinstance(values, (list, tuple)):
        raise ValueError("expected a list of queues, or one text with commas")
    names = [name for item in values for name in (item.split(",") if isinstance(item, str) else [item])]
    return tuple(dict.fromkeys(check_queue(name.strip() if isinstance(name, str) else name) for name in names))


SETTINGS: tuple[Setting, ...] = (
    Setting("app", _text, "the app to run, as module:attribute", "APP"),
    Setting(
        "dsn", check_dsn, "the database (default: DATABASE_URL, else an embedded PostgreSQL under .pgtask/)", "DSN"
    ),
    Setting("procs", _whole(1), "worker processes (default: the usable CPUs)", "N"),
    Setting("concurrency", _whole(1), "steps that may be suspended at once in each worker (default: 100)", "N"),
    Setting("batch", _whole(1), "most tasks taken by one claim (default: 500)", "N"),
    Setting("pool_size", _whole(1), "most connections of ctx.db, in each worker (default: 10)", "N"),
    Setting(
        "queue", _queues, "serve only this queue; may be given several times, or as a,b (default: every queue)", "NAME"
    ),
    Setting("lease_timeout", _seconds(zero=False), "seconds a lease lasts without renewal (default: 60)", "S"),
    Setting(
        "heartbeat_interval",
        _seconds(zero=False),
        "seconds between renewals (default: a third of the lease timeout)",
        "S",
    ),
    Setting("burst", _switch, "run until nothing is left to do, then exit"),
    Setting("burst_horizon", _seconds(zero=True), "with --burst, wait for what falls due within S (default: 60)", "S"),
    Setting(
        "grace", _seconds(zero=True), "seconds that running steps are given to finish on a stop (default: 30)", "S"
    ),
    Setting(
        "stall",
        _seconds(zero=True, least=LEAST_STALL),
        "replace a worker whose loop is silent for S; 0 is never (default: 300)",
        "S",
    ),
    Setting("max_tasks", _whole(0), "replace a worker after about N tasks; 0 is never (default: 0)", "N"),
    Setting("max_rss", _whole(0), "replace a worker that holds more than MB of memory; 0 is never (default: 0)", "MB"),
    Setting("pin", _switch, "give each worker one CPU, in turn"),
    Setting("preload", _switch, "import the app before the workers are forked, so that they share its memory"),
    Setting("reload", _switch, "for development: replace the workers when the source of the app changes"),
    Setting(
        "unknown", _one_of("put-back", "park"), "steps this app lacks: put-back or park (default: put-back)", "WHAT"
    ),
    Setting("max_step_bytes", _whole(1), "park steps larger than this (default: 524288)", "BYTES"),
    Setting("listen", _switch, "do not LISTEN, poll only: for a transaction-pooling pgbouncer", negated=True),
    Setting("ignore_stop_notify", _switch, "ignore NOTIFY pg_task_changed, 'stop_worker'"),
    Setting("log", _one_of("text", "json"), "format of the log: text or json (default: text)", "FORMAT"),
    Setting(
        "log_level",
        _one_of("debug", "info", "warning", "error"),
        "debug, info, warning or error (default: info)",
        "LEVEL",
    ),
)
