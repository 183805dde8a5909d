"""Setting of a measurement, as each report holds it, and the lines that all cards share."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime

import msgspec

from bench.harness.machine import current_commit, machine_facts, package_versions
from bench.harness.server import Server
from bench.harness.spread import Spread

__all__ = ["Setting", "card_head", "fact_line", "failure_lines", "format_spread", "setting_of"]


class Setting(msgspec.Struct, frozen=True):
    """Time, code, machine and server of a measurement."""

    at: str
    commit: str
    machine: dict[str, str | int | float]
    versions: dict[str, str]
    server: str
    settings: dict[str, str]


def setting_of(server: Server, machine: dict[str, str | int | float] | None = None) -> Setting:
    """Describe the setting. Call it before the measurement, or pass `machine_facts` of before: they hold the load."""
    return Setting(
        at=datetime.now(UTC).isoformat(timespec="seconds"),
        commit=current_commit(),
        machine=machine or machine_facts(),
        versions=package_versions(),
        server=server.version,
        settings=server.settings,
    )


# --- lines of a card


def card_head(setting: Setting, title: str) -> Iterator[str]:
    yield title
    yield f"at        {setting.at}, commit {setting.commit}"
    yield fact_line("machine", setting.machine)
    yield fact_line("versions", setting.versions)
    yield f"server    {setting.server.split(',')[0]}; fsync, synchronous_commit and full_page_writes on"
    yield ""


def fact_line(label: str, facts: Mapping[str, object]) -> str:
    return f"{label:<10}" + ", ".join(f"{name} {value}" for name, value in facts.items())


def failure_lines(failures: Sequence[str]) -> list[str]:
    return [f"FAILED    {failure}" for failure in failures]


def format_spread(numbers: Spread, form: str) -> str:
    return f"{numbers.median:{form}} ({numbers.min:{form}} - {numbers.max:{form}})"
