"""The settings: one line of the table for each one, and `Config`, which holds their values.

To add a setting, add its line to `SETTINGS` and its field to `Config`: the flag, the variable, the key of the file and
the help follow.

Invariant: a value that a `Setting` has parsed is valid by itself; `config` checks the rules between two settings.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import msgspec

from pgtask._dsn import check_dsn, quoted, redact
from pgtask._durations import MAX_SECONDS, parse_duration
from pgtask.policy import check_queue

__all__ = ["DEFAULT_MAX_STEP_BYTES", "PREFIX", "SETTINGS", "Config", "Setting", "default_heartbeat"]

PREFIX = "PGTASK_"
DEFAULT_LEASE_TIMEOUT = 60.0
DEFAULT_MAX_STEP_BYTES = 512 * 1024
MIN_STALL = 2  # seconds in which the loop of a healthy worker sends four ticks


class Setting(msgspec.Struct, frozen=True):
    """One setting: its name in `Config`, its default, the parser of its text, its group in the help, and its help. The
    flag, the variable and the key of the file follow from the name.

    `default_words` describes a default that no single value can: one from elsewhere, or computed from other values.
    """

    name: str
    default: Any
    parse: Callable[[Any], Any]
    group: str | None
    summary: str
    metavar: str | None = None
    short: str | None = None
    default_words: str | None = None
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
        return self.parse is _parse_switch

    @property
    def choices(self) -> tuple[str, ...]:
        """All its values, if they are few."""
        return self.parse.choices if isinstance(self.parse, _Choice) else ()

    @property
    def help(self) -> str:
        """The summary, with the default of a setting that takes a value."""
        if self.is_switch:
            return self.summary
        shown = f"{self.default:g}" if isinstance(self.default, float) else str(self.default)
        return f"{self.summary} (default: {self.default_words or shown})"


def default_heartbeat(lease_timeout: float) -> float:
    """Return the seconds between renewals where the setting is not given."""
    return lease_timeout / 3


# --- parsers: each returns a value, or raises `ValueError` with what it expected ------------------------------------


def _parse_text(value: Any) -> str:
    if not isinstance(value, str) or not value:
        raise ValueError("expected a text")
    return value


def _whole_number(minimum: int) -> Callable[[Any], int]:
    def parse(value: Any) -> int:
        message = f"expected a whole number, {minimum} or more"
        if isinstance(value, (bool, float)):
            raise ValueError(message)
        try:
            number = int(value)
        except (TypeError, ValueError):
            raise ValueError(message) from None
        if not minimum <= number < 2**31:
            raise ValueError(message + (f", less than {2**31:,}" if number > 0 else ""))
        return number

    return parse


def _seconds(*, zero: bool, minimum: int = 0) -> Callable[[Any], float]:
    """A number of seconds, or a text with units. With `minimum`, zero means never."""
    bound = f"{minimum} or more, or 0 for never" if minimum else "zero or more" if zero else "more than zero"

    def parse(value: Any) -> float:
        message = f"expected seconds, {bound}"
        try:
            number = parse_duration(str(value))
        except ValueError:
            raise ValueError(f"{message}, or a time span such as 90s, 5m or 1h30m") from None
        if number >= MAX_SECONDS:
            raise ValueError(f"{message}, less than {MAX_SECONDS:,}")
        if number < minimum and not (zero and number == 0):
            raise ValueError(message)
        if number == 0 and not zero:
            raise ValueError(message)
        return number

    return parse


def _parse_address(value: Any) -> tuple[str, int]:
    """Return host and port; no host is all addresses. [::1]:9464 is a host of IPv6."""
    host, _, port = str(value).rpartition(":")
    if isinstance(value, (bool, float)) or not (port.isascii() and port.isdecimal() and int(port) < 65536):
        raise ValueError("expected a port from 0 to 65535, or HOST:PORT")
    if host.startswith("[") and host.endswith("]"):
        host = host[1:-1]
    elif ":" in host:
        raise ValueError("expected HOST:PORT; write an address of IPv6 as [::1]:9464")
    return host, int(port)


class _Choice:
    """The parser of a setting that has few values."""

    def __init__(self, *choices: str) -> None:
        self.choices = choices

    def __call__(self, value: Any) -> str:
        if str(value).lower() not in self.choices:
            raise ValueError("expected one of " + ", ".join(self.choices))
        return str(value).lower()


def _parse_switch(value: Any) -> bool:
    if isinstance(value, bool):
        return value
    match str(value).strip().lower():
        case "1" | "true" | "yes" | "on":
            return True
        case "0" | "false" | "no" | "off" | "":
            return False
    raise ValueError("expected true or false")


def _parse_queues(value: Any) -> tuple[str, ...]:
    values = [value] if isinstance(value, str) else value
    if not isinstance(values, (list, tuple)):
        raise ValueError("expected a list of queues, or one text with commas")
    names = [name for item in values for name in (item.split(",") if isinstance(item, str) else [item])]
    try:
        return tuple(dict.fromkeys(check_queue(name.strip() if isinstance(name, str) else name) for name in names))
    except ValueError:
        if quoted(value) == repr(value):
            raise
    raise ValueError("a queue is a printable text without a comma; a database goes into --dsn")


SETTINGS: tuple[Setting, ...] = (
    Setting(
        "app",
        None,
        _parse_text,
        None,
        "the app to run, as module:attribute",
        "APP",
        default_words="PGTASK_APP, else app in pyproject.toml",
    ),
    Setting(
        "dsn",
        None,
        check_dsn,
        "database",
        "the database",
        "DSN",
        default_words="PGTASK_DSN, else dsn in pyproject.toml, else DATABASE_URL, else an embedded PostgreSQL "
        "in .pgtask/",
    ),
    Setting(
        "procs", 1, _whole_number(1), "workers", "worker processes", "N", short="-p", default_words="the usable CPUs"
    ),
    Setting(
        "concurrency",
        100,
        _whole_number(1),
        "workers",
        "steps that may wait (in an await or in a thread) at once in each worker",
        "N",
        "-c",
    ),
    Setting("batch", 500, _whole_number(1), "workers", "maximum number of tasks that one claim takes", "N"),
    Setting(
        "pool_size", 10, _whole_number(1), "workers", "maximum number of connections of ctx.db in each worker", "N"
    ),
    Setting(
        "queue",
        (),
        _parse_queues,
        "tasks",
        "serve only this queue; may be given several times, or as a,b",
        "NAME",
        "-q",
        default_words="every queue",
    ),
    Setting(
        "lease_timeout",
        DEFAULT_LEASE_TIMEOUT,
        _seconds(zero=False),
        "workers",
        "how long a lease lasts without renewal",
        "TIME",
    ),
    Setting(
        "heartbeat_interval",
        default_heartbeat(DEFAULT_LEASE_TIMEOUT),
        _seconds(zero=False),
        "workers",
        "the time between renewals",
        "TIME",
        default_words="a third of the lease timeout",
    ),
    Setting("burst", False, _parse_switch, "start and stop", "run until nothing is left to do, then exit"),
    Setting(
        "burst_horizon",
        60.0,
        _seconds(zero=True),
        "start and stop",
        "with --burst, wait for what falls due within TIME",
        "TIME",
    ),
    Setting(
        "grace",
        30.0,
        _seconds(zero=True),
        "start and stop",
        "grace period in which running steps may finish on a stop",
        "TIME",
    ),
    Setting(
        "stall",
        300.0,
        _seconds(zero=True, minimum=MIN_STALL),
        "health",
        "replace a worker whose loop is silent for TIME; 0 is never",
        "TIME",
    ),
    Setting("max_tasks", 0, _whole_number(0), "health", "replace a worker after about N tasks; 0 is never", "N"),
    Setting(
        "max_rss", 0, _whole_number(0), "health", "replace a worker that holds more than MB of memory; 0 is never", "MB"
    ),
    Setting(
        "metrics",
        None,
        _parse_address,
        "health",
        "serve metrics for Prometheus, /livez and /readyz at this port, of all addresses unless HOST is given",
        "[HOST:]PORT",
        default_words="none",
    ),
    Setting("pin", False, _parse_switch, "workers", "give each worker one CPU, in turn"),
    Setting(
        "preload",
        False,
        _parse_switch,
        "start and stop",
        "import the app before the workers are forked, so that they share its memory",
    ),
    Setting(
        "reload",
        False,
        _parse_switch,
        "start and stop",
        "for development: replace the workers when the source of the app changes",
    ),
    Setting(
        "unknown",
        "put-back",
        _Choice("put-back", "park"),
        "tasks",
        "what to do with steps that this app does not define: put-back or park",
        "WHAT",
    ),
    Setting(
        "max_step_bytes", DEFAULT_MAX_STEP_BYTES, _whole_number(1), "tasks", "park steps larger than this", "BYTES"
    ),
    Setting(
        "listen",
        True,
        _parse_switch,
        "database",
        "do not LISTEN, poll only: for a transaction-pooling pgbouncer",
        negated=True,
    ),
    Setting(
        "ignore_stop_notify",
        False,
        _parse_switch,
        "database",
        "obey pgtask stop, but not NOTIFY pg_task_changed, 'stop_worker'",
    ),
    Setting("log", "text", _Choice("text", "json"), "log", "format of the log: text or json", "FORMAT"),
    Setting(
        "log_level",
        "info",
        _Choice("debug", "info", "warning", "error"),
        "log",
        "debug, info, warning or error",
        "LEVEL",
        "-l",
    ),
)

_DEFAULTS = {setting.name: setting.default for setting in SETTINGS}


class Config(msgspec.Struct, frozen=True, kw_only=True):
    """All settings of a supervisor and its workers. Times are seconds. `dsn=None` is the embedded server."""

    app: str | None = _DEFAULTS["app"]
    dsn: str | None = _DEFAULTS["dsn"]
    procs: int = _DEFAULTS["procs"]
    concurrency: int = _DEFAULTS["concurrency"]
    batch: int = _DEFAULTS["batch"]
    pool_size: int = _DEFAULTS["pool_size"]
    queue: tuple[str, ...] = _DEFAULTS["queue"]
    lease_timeout: float = _DEFAULTS["lease_timeout"]
    heartbeat_interval: float = _DEFAULTS["heartbeat_interval"]
    burst: bool = _DEFAULTS["burst"]
    burst_horizon: float = _DEFAULTS["burst_horizon"]
    grace: float = _DEFAULTS["grace"]
    stall: float = _DEFAULTS["stall"]
    max_tasks: int = _DEFAULTS["max_tasks"]
    max_rss: int = _DEFAULTS["max_rss"]
    metrics: tuple[str, int] | None = _DEFAULTS["metrics"]
    pin: bool = _DEFAULTS["pin"]
    preload: bool = _DEFAULTS["preload"]
    reload: bool = _DEFAULTS["reload"]
    unknown: str = _DEFAULTS["unknown"]
    max_step_bytes: int = _DEFAULTS["max_step_bytes"]
    listen: bool = _DEFAULTS["listen"]
    ignore_stop_notify: bool = _DEFAULTS["ignore_stop_notify"]
    log: str = _DEFAULTS["log"]
    log_level: str = _DEFAULTS["log_level"]

    def __repr__(self) -> str:
        shown = {name: getattr(self, name) for name in self.__struct_fields__}
        shown["dsn"] = None if self.dsn is None else redact(self.dsn)
        return f"Config({', '.join(f'{name}={value!r}' for name, value in shown.items())})"
