"""Interface of a scenario: one command of `python -m bench`."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Protocol, TypeVar

import msgspec

from bench.harness.progress import Progress

__all__ = ["Report", "Scenario"]


class Report(msgspec.Struct, frozen=True):
    """Result of a scenario. Its fields are the keys of the JSON file; `bench` is the name of the scenario."""

    bench: str

    @property
    def failures(self) -> Sequence[str]:
        """List the failed runs, one line each. The exit code is 1 if there are any."""
        return ()


R = TypeVar("R", bound=Report)


class Scenario(Protocol[R]):
    """A scenario: its command line, its measurement, and the text it prints. `help` is one line for `--help`."""

    name: str
    help: str

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        """Add all flags but `--json`, which every scenario has."""
        ...

    def measure(self, arguments: argparse.Namespace, progress: Progress) -> R:
        """Measure. `progress` takes a line about each round.

        Raises `BenchError` if nothing can be measured, and `RunFailed` if a run fails that the report needs.
        """
        ...

    def card(self, report: R) -> str:
        """Format the report as one page of text."""
        ...
