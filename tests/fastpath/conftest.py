"""The loops on which the tests of the fast path run."""

from __future__ import annotations

import pytest
from jumping_loop import Clock


@pytest.fixture(params=["asyncio", "uvloop"])
def clock(request: pytest.FixtureRequest) -> Clock:
    found: Clock = request.param
    return found
