"""The database of a fleet as an operator sees it."""

from __future__ import annotations

import pytest
from fleet import Rows
from marks import MARKS


@pytest.fixture
def rows(dsn: str) -> Rows:
    """Query the database of the test, in which steps can leave marks."""
    found = Rows(dsn)
    found(MARKS)
    return found
