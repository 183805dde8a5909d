"""The sources of the settings: flags, the environment and `pyproject.toml`, merged and checked into a `Config`.

Invariants: flag > environment (`PGTASK_...`) > `[tool.pgtask]` of `pyproject.toml` in the project directory > default;
a `Config` that could be made is valid, and inner code trusts it.
"""

from __future__ import annotations

import os
import re
import tomllib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from pgtask._cpus import default_procs
from pgtask._dsn import quoted, redact
from pgtask._nearest import did_you_mean, nearest
from pgtask._project import find_project
from pgtask._settings import DEFAULT_MAX_STEP_BYTES, PREFIX, SETTINGS, Config, Setting, default_heartbeat
from pgtask.errors import ConfigError

__all__ = [
    "DEFAULT_MAX_STEP_BYTES",
    "Config",
    "client_config",
    "config_sources",
    "dsn_source",
    "load_config",
    "use_config",
    "use_project",
]

# Not settings: Kubernetes sets these for services called `pgtask` or `pgtask-...`; our build and tests read the last.
_OTHER_VARIABLES = re.compile(r"PGTASK_((.*_)?(SERVICE_HOST|SERVICE_PORT.*|PORT|PORT_\d.*)|DEBUG|TEST_.*)")


_DSN = next(setting for setting in SETTINGS if setting.name == "dsn")
# Other programs use it as well: it is read, and checked, only where no source of ours names a database.
_FOREIGN_DSN = "DATABASE_URL"


def load_config(
    flags: Mapping[str, Any] | None = None,
    *,
    environ: Mapping[str, str] | None = None,
    directory: Path | None = None,
) -> Config:
    """Merge the sources and check every value. `flags` holds only what was given. Raises `ConfigError`."""
    flags = flags or {}
    environ = os.environ if environ is None else environ
    file = _read_file(directory or find_project())
    _refuse_misspelt_variables(environ)
    values: dict[str, Any] = {}
    for setting in SETTINGS:
        for source, raw in _find_sources(setting, flags, environ, file):  # an overridden value is checked as well
            value = _parse_value(setting, source, raw)
            values[setting.name] = not value if setting.negated else value
    if "procs" not in values:
        values["procs"] = default_procs()
    if "heartbeat_interval" not in values and "lease_timeout" in values:
        values["heartbeat_interval"] = default_heartbeat(values["lease_timeout"])
    config = Config(**values)
    if config.heartbeat_interval >= config.lease_timeout:
        raise ConfigError(
            f"heartbeat interval {config.heartbeat_interval:g} s is not shorter than the lease timeout "
            f"{config.lease_timeout:g} s: leases would end before they are renewed; lower --heartbeat-interval"
        )
    if config.reload and config.preload:
        raise ConfigError("--reload and --preload exclude each other: what is imported before the fork stays as it is")
    return config


_config_in_use: Config | None = None


def use_config(config: Config | None) -> None:
    """Make these the settings of this process and of its forks: the workers, and the processes that their steps fork.

    Clients there use this database and ignore the environment. None: clients read the environment again."""
    global _config_in_use
    _config_in_use = config


def client_config(dsn: str | None) -> Config:
    """Return the settings for a client with this DSN, or without one: in a worker those of its supervisor, unless the
    client has another database; elsewhere those of the environment and the file. Raises `ConfigError`."""
    if _config_in_use is not None and dsn in (None, _config_in_use.dsn):
        return _config_in_use
    return load_config()


_project: Mapping[str, tuple[str, str]] = {}


def use_project(values: Mapping[str, tuple[str, str]]) -> None:
    """Name the settings of the framework that a program is part of: by the name of a setting its source and its text.
    They count where no source of ours has any."""
    global _project
    _project = values


def config_sources(flags: Mapping[str, Any], *names: str) -> dict[str, Any]:
    """Return of these settings the ones that a source of ours gives, as they are written there."""
    file = _read_file(find_project())
    settings = [setting for setting in SETTINGS if setting.name in names]
    found = {setting.name: list(_own_sources(setting, flags, os.environ, file)) for setting in settings}
    return {name: sources[-1][1] for name, sources in found.items() if sources}


def dsn_source(flags: Mapping[str, Any]) -> tuple[str, str] | None:
    """Return the flag, variable or key that names the database, and its text; None for the embedded one."""
    found = list(_find_sources(_DSN, flags, os.environ, _read_file(find_project())))
    return found[-1] if found else None


def _parse_value(setting: Setting, source: str, raw: Any) -> Any:
    try:
        return setting.parse(raw)
    except ValueError as error:
        raise ConfigError(f"{source}={_quote_value(setting, raw)}: {error}") from None


def _quote_value(setting: Setting, raw: Any) -> str:
    """Return the text that was given as a message quotes it."""
    if setting is not _DSN:
        return quoted(raw)
    return repr(redact(raw)) if isinstance(raw, str) else f"({type(raw).__name__})"


def _find_sources(
    setting: Setting, flags: Mapping[str, Any], environ: Mapping[str, str], file: Mapping[str, Any]
) -> Iterator[tuple[str, Any]]:
    """Yield each source that gives the setting, with its text; the strongest comes last."""
    sources = list(_own_sources(setting, flags, environ, file))
    if not sources and setting.name in _project:
        sources = [_project[setting.name]]
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


def _read_file(directory: Path | None) -> Mapping[str, Any]:
    """Read `[tool.pgtask]` of the file. A directory that was removed, or that we may not enter, has no file."""
    if directory is None or not os.access(directory, os.X_OK):
        return {}
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
            hint = did_you_mean(key, [setting.key for setting in SETTINGS], cutoff=0.75)
            raise ConfigError(f"[tool.pgtask] {key}: there is no such setting{hint}")
    return section


def _refuse_misspelt_variables(environ: Mapping[str, str]) -> None:
    """Raise `ConfigError` for a variable that is nearly one of ours: it would have no effect, and no message would say
    so. Other variables with our prefix may be the user's."""
    known = [setting.variable.removeprefix(PREFIX) for setting in SETTINGS]
    for name in sorted(environ):
        word = name.removeprefix(PREFIX)
        if word == name or word in known or not environ[name] or _OTHER_VARIABLES.fullmatch(name):
            continue
        if meant := _meant_variable(word, known):
            raise ConfigError(f"{name}: there is no such setting; did you mean {PREFIX}{meant}?")


def _meant_variable(word: str, known: list[str]) -> str | None:
    """Return the setting that PGTASK_DNS, PGTASK_DATABASE_URL or PGTASK_LEASE was meant to name; None if unclear."""
    if word in ("URL", "URI", "DATABASE", "DB") or word.endswith(("DATABASE_URL", "DB_URL", "POSTGRES_URL")):
        return "DSN"
    swapped = [name for name in known if sorted(name) == sorted(word)]
    whole = [name for name in known if word in name.split("_")]
    return next(iter(swapped), None) or nearest(word, known) or next(iter(whole), None)
