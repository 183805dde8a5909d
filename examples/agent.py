"""A long loop that looks, thinks and acts, and asks a person now and then: the shape of an agent.

    python -m examples.agent DIRECTORY && pgtask-supervisor examples.agent:app --procs 1
    pgtask run ID
    pgtask signal ID answer '"go on"'

It looks for the largest file below a directory, one directory at a time. In `think` your agent would call its model: it
gets the known facts and returns the next action. The run records each thought and each action, so you pay for none of
them twice, even after a kill. Every hundred actions it asks you whether to go on, and waits for an hour.
"""

from __future__ import annotations

import asyncio
import sys
from datetime import timedelta
from pathlib import Path

import msgspec

from pgtask import App, Client, Policy, SignalTimeout, WorkflowContext, workflow

ASK_EVERY = 100
PATIENCE = timedelta(hours=1)


class Known(msgspec.Struct):
    """The knowledge of the agent: the directories it has yet to read, and the largest file so far."""

    to_do: list[str]
    largest: str = ""
    size: int = -1


class Seen(msgspec.Struct):
    """The content of one directory."""

    directories: list[str]
    largest: str = ""
    size: int = -1


async def think(known: Known) -> str | None:
    """Choose the next directory; return None when the answer is known."""
    return known.to_do[-1] if known.to_do else None


def look(directory: str) -> Seen:
    seen = Seen([])
    for path in sorted(Path(directory).iterdir()):
        if path.is_symlink():
            continue
        if path.is_dir():
            seen.directories.append(str(path))
        elif path.is_file() and (size := path.stat().st_size) > seen.size:
            seen.largest, seen.size = str(path), size
    return seen


@workflow("largest_file", policy=Policy(retry_limit=3, timeout=timedelta(minutes=1)))
async def largest_file(ctx: WorkflowContext, directory: str) -> str:
    known = Known([directory])
    turn = 0
    while (where := await ctx.step(f"think {turn}", think, known)) is not None:
        seen = await ctx.step(f"look {turn}", look, where)
        known.to_do.remove(where)
        known.to_do += seen.directories
        if seen.size > known.size:
            known.largest, known.size = seen.largest, seen.size
        turn += 1
        if turn % ASK_EVERY == 0:
            try:
                answer = await ctx.wait_for_signal("answer", str, timeout=PATIENCE)
            except SignalTimeout:
                answer = "stop"
            if answer == "stop":
                break
    return f"{known.largest} ({known.size:,} bytes) after {turn} turns"


app = App(largest_file)


async def main(directory: str = ".") -> None:
    async with Client() as client:
        run = await client.trigger(largest_file, str(Path(directory).resolve()))
        print(run.id)


if __name__ == "__main__":
    if len(sys.argv) > 2 or not Path(*sys.argv[1:]).is_dir():
        sys.exit("usage: python -m examples.agent [DIRECTORY]")
    asyncio.run(main(*sys.argv[1:]))
