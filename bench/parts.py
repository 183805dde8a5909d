"""What the small benchmarks share: the head of their reports, and filling `pg_task` by SQL."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime

import msgspec

from bench.floor import envelope
from bench.machine import commit, machine, versions
from bench.server import Server
from bench.workloads import WORKLOADS

__all__ = ["Setting", "fill_by_sql", "head", "setting_of"]


class Setting(msgspec.Struct, frozen=True):
    """Where, when and with what."""

    at: str
    commit: str
    machine: dict[str, str | int | float]
    versions: dict[str, str]
    server: str
    settings: dict[str, str]


def setting_of(server: Server) -> Setting:
    """Ask for it before anything is measured: it holds the load of the machine."""
    return Setting(
        at=datetime.now(UTC).isoformat(timespec="seconds"),
        commit=commit(),
        machine=machine(),
        versions=versions(),
        server=server.version,
        settings=server.settings,
    )


def head(setting: Setting, title: str) -> Iterator[str]:
    yield title
    yield f"at        {setting.at}, commit {setting.commit}"
    yield "machine   " + ", ".join(f"{name} {value}" for name, value in setting.machine.items())
    yield "versions  " + ", ".join(f"{name} {value}" for name, value in setting.versions.items())
    yield f"server    {setting.server.split(',')[0]}; fsync, synchronous_commit and full_page_writes on"
    yield ""


def fill_by_sql(server: Server, dsn: str, tasks: int, columns: str = "", values: str = "") -> None:
    """That many no-op tasks in one statement; `columns` and `values` (SQL, with `n` for the number of the task) say
    what else they are."""
    if not tasks:
        return
    step = envelope(WORKLOADS["noop"].make(100_000)).replace("'", "''")
    names, rest = ("step", f"'{step}'") if not columns else (f"step, {columns}", f"'{step}', {values}")
    server.query(f"INSERT INTO pg_task ({names}) SELECT {rest} FROM generate_series(1, {tasks}) AS n", dsn=dsn)
