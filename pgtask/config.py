"""The configuration: the settings as flags, the environment and `pyproject.toml` say, checked once at the door.

Invariants: flag > environment (`PGTASK_...`) > `[tool.pgtask]` of `pyproject.toml` in the working directory > default;
a `Config` that could be made is valid, and inner code trusts it.
"""

from __future__ import annotations

import difflib
import os
import re
import tomllib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import msgspec

from pgtask._cpus import default_procs
from pgtask._dsn import redact
from pgtask._settings import PREFIX, SETTINGS, Setting
from pgtask.errors import ConfigError

__all__ = ["Config", "dsn_source", "load_config"]

DEFAULT_MAX_STEP_BYTES = 512 * 1024
# Not settings: what Kubernetes tells of services called `pgtask` or `pgtask-...`, and what our build and tests read.
_OF_OTHERS = re.compile(r"PGTASK_((.*_)?(SERVICE_HOST|SERVICE_PORT.*|PORT|PORT_\d.*)|DEBUG|TEST_.*)")


class Config(msgspec.Struct, frozen=True, kw_only=True):
    """All settings of a supervisor and its workers. Times are seconds. `dsn=None` is the embedded server."""

    app: str | None = None
    dsn: str | None = None
    procs: int = 1
    concurrency: int = 100
    batch: int = 500
    pool_size: int = 10
    queue: tuple[str, ...] = ()
    lease_timeout: float = 60.0
    heartbeat_interval: float = 20.0
    burst: bool = False
    burst_horizon: float = 60.0
    grace: float = 30.0
    stall: float = 300.0
    max_tasks: int = 0
    max_rss: int = 0
    pin: bool = False
    preload: bool = False
    reload: bool = False
    unknown: str = "put-back"
    max_step_bytes: int = DEFAULT_MAX_STEP_BYTES
    listen: bool = True
    ignore_stop_notify: bool = False
    log: str = "text"
    log_level: str = "info"


_DSN = next(setting for setting in SETTINGS if setting.name == "dsn")
_FOREIGN_DSN = "DATABASE_URL"  # what others use as well: it counts, and is looked at, where nothing of ours says more


def load_config(
    flags: Mapping[str, Any] | None = None,
    *,
    environ: Mapping[str, str] | None = None,
    directory: Path | None = None,
) -> Config:
    """Merge the sources and check every value. `flags` holds only what was given. Raises `ConfigError`."""
    flags = flags or {}
    environ = os.environ if environ is None else environ
    file = _file_section(directory or Path.cwd())
    _refuse_misspelt_variables(environ)
    values: dict[str, Any] = {}
    for setting in SETTINGS:
        for source, raw in _find(setting, flags, environ, file):  # what is overridden is checked as well
            value = _read(setting, source, raw)
            values[setting.name] = not value if setting.negated else value
    if "procs" not in values:
        values["procs"] = default_procs()
    if "heartbeat_interval" not in values and "lease_timeout" in values:
        values["heartbeat_interval"] = values["lease_timeout"] / 3
    config = Config(**values)
    if config.heartbeat_interval >= config.lease_timeout:
        raise ConfigError(
            f"heartbeat interval {config.heartbeat_interval:g} s is not shorter than the lease timeout "
            f"{config.lease_timeout:g} s: leases would end before they are renewed; lower --heartbeat-interval"
        )
    if config.reload and config.preload:
        raise ConfigError("--reload and --preload exclude each other: what is imported before the fork stays as it is")
    return config


def dsn_source(flags: Mapping[str, Any]) -> tuple[str, str] | None:
    """Which flag, variable or key names the database, and what it says; None for the embedded one."""
    found = list(_find(_DSN, flags, os.environ, _file_section(Path.cwd())))
    return found[-1] if found else None


def _read(setting: Setting, source: str, raw: Any) -> Any:
    try:
        return setting.parse(raw)
    except ValueError as error:
        shown = redact(raw) if setting is _DSN and isinstance(raw, str) else raw
        raise ConfigError(f"{source}={shown!r}: {error}") from None


def _find(
    setting: Setting, flags: Mapping[str, Any], environ: Mapping[str, str], file: Mapping[str, Any]
) -> Iterator[tuple[str, Any]]:
    """Which source says what, the strongest last."""
    sources = list(_own_sources(setting, flags, environ, file))
    if setting is _DSN and not sources and environ.get(_FOREIGN_DSN):
        yield _FOREIGN_DSN, environ[_FOREIGN_DSN]
    yield from sources


def _own_sources(
    setting: Setting, flags: Mapping[str, Any], environ: Mapping[str, str], file: Mapping[str, Any]
) -> Iterator[tuple[str, Any]]:
    for key in dict.fromkeys((setting.key.replace("-", "_"), setting.key)):
        if key in file:
            yield f"[tool.pgtask] {key}", file[key]
    if environ.get(setting.variable):
        yield setting.variable, environ[setting.variable]
    if flags.get(setting.name) is not None:
        yield setting.flag, flags[setting.name]


def _file_section(directory: Path) -> Mapping[str, Any]:
    path = directory / "pyproject.toml"
    try:
        with path.open("rb") as stream:
            tool = tomllib.load(stream).get("tool", {})
    except FileNotFoundError:
        return {}
    except (OSError, tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path.name}: {error}") from None
    section = tool.get("pgtask", {}) if isinstance(tool, dict) else tool
    if not isinstance(section, dict):
        raise ConfigError(f"{path.name}: [tool.pgtask] must be a table of settings")
    known = {name for setting in SETTINGS for name in (setting.key, setting.key.replace("-", "_"))}
    for key in section:
        if key not in known:
            meant = _meant(key, [setting.key for setting in SETTINGS])
            hint = f"; did you mean {meant}?" if meant else ""
            raise ConfigError(f"[tool.pgtask] {key}: there is no such setting{hint}")
    return section


def _refuse_misspelt_variables(environ: Mapping[str, str]) -> None:
    """A variable that is nearly one of ours would do nothing in silence. Others with our prefix may be the user's."""
    known = [setting.variable.removeprefix(PREFIX) for setting in SETTINGS]
    for name in sorted(environ):
        word = name.removeprefix(PREFIX)
        if word == name or word in known or not environ[name] or _OF_OTHERS.fullmatch(name):
            continue
        if meant := _meant_variable(word, known):
            raise ConfigError(f"{name}: there is no such setting; did you mean {PREFIX}{meant}?")


def _meant_variable(word: str, known: list[str]) -> str | None:
    """Which setting a person has in mind who writes PGTASK_DNS, PGTASK_DATABASE_URL or PGTASK_LEASE."""
    if word in ("URL", "URI", "DATABASE", "DB") or word.endswith(("DATABASE_URL", "DB_URL", "POSTGRES_URL")):
        return "DSN"
    swapped = [name for name in known if sorted(name) == sorted(word)]
    whole = [name for name in known if word in name.split("_")]
    return next(iter(swapped), None) or _meant(word, known) or next(iter(whole), None)


def _meant(name: str, known: list[str]) -> str | None:
    return next(iter(difflib.get_close_matches(name, known, n=1, cutoff=0.75)), None)
