"""What `pgtask check` names is what a worker with the new code parks, for each of many changes."""

from __future__ import annotations

import pytest
from checked import CHANGES
from fix_checked import parked_by_worker
from fix_commands import Command

pytestmark = [pytest.mark.faults, pytest.mark.timeout(120)]


@pytest.mark.parametrize("change", CHANGES)
def test_every_change_breaks_what_a_worker_parks(waiting: str, command: Command, change: str) -> None:
    named = {
        cause["what"].removesuffix(".Run") for cause in command("check", f"checked:app_{change}", "--json").objects
    }
    assert named == parked_by_worker(waiting, change)
