"""A migrated database, come about in each of the ways there are."""

from __future__ import annotations

from typing import Any

import pytest
from crate import SHAPES
from schema_kit import play

from pgtask._postgres.migrate import migrate


@pytest.fixture(params=list(SHAPES))
def shaped(request: pytest.FixtureRequest, empty_dsn: str) -> str:
    """A migrated database, come about in each of the ways there are."""
    made_by, keep = SHAPES[request.param]

    async def make(db: Any) -> None:
        if made_by:
            await db.execute(made_by)
        await migrate(empty_dsn, keep_pg_task=keep)

    play(empty_dsn, make)
    return empty_dsn
