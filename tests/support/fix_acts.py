"""A step that notes its name; the notes are those of one test."""

from __future__ import annotations

import asyncio

import pytest

did: list[str] = []


@pytest.fixture(autouse=True)
def nothing_done() -> None:
    did.clear()


async def act(name: str) -> str:
    did.append(name)
    return name


async def act_late(name: str) -> str:
    """Act after the other branches have begun."""
    await asyncio.sleep(0)
    return await act(name)
