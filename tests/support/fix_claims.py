"""The times of claims and renewals, changed for a test."""

from __future__ import annotations

from typing import Any

import pytest

import pgtask.consumer
from pgtask._worker import claim as module
from pgtask._worker.renew import Renew


class HastyRenew(Renew):
    """Renews each lease many times a second, however long it lasts. `turns` counts the answers that it has read."""

    turns = 0

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **{**options, "heartbeat_interval": 0.1})

    async def _renew_due(self, link: Any) -> None:
        await super()._renew_due(link)
        self.turns += 1


@pytest.fixture
def hasty_renewal(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a consumer renew its leases at once, also those that last for long."""
    monkeypatch.setattr(pgtask.consumer, "Renew", HastyRenew)


@pytest.fixture
def without_debounce(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make a hint cause a poll at once."""
    monkeypatch.setattr(module, "DEBOUNCE", 0.0)


@pytest.fixture
def unhurried(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep a claim from polling again by itself, so that a test can read its state."""
    monkeypatch.setattr(module, "POLL_INTERVAL", 10.0)
