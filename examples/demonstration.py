"""Tools of the three showpieces: a database, a supervisor whose workers may be killed, and HTTP on this machine.

Nothing here is special to pgtask. The showpieces are `examples/load.py`, `examples/crawl.py` and `examples/embed.py`.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import random
import subprocess
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any, TypeAlias

import asyncpg
import psutil

from pgtask import Client

EMBEDDED = Path(".pgtask/data/postmaster.pid")  # exists while the embedded server runs

Headers: TypeAlias = dict[str, str]
Answer: TypeAlias = tuple[int, Headers, str]


def whole_number(text: str) -> int:
    """Read a whole number from 0, for argparse."""
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number")
    return int(text)


@contextlib.contextmanager
def database() -> Iterator[None]:
    """Give the database the schema of pgtask. At the end, stop the embedded server if this has started it."""
    was_running = EMBEDDED.exists()
    try:
        migrate = subprocess.run([program("pgtask"), "migrate"], check=False, stdout=subprocess.DEVNULL)
        if migrate.returncode:  # it has said why
            raise SystemExit(migrate.returncode)
        yield
    finally:
        if EMBEDDED.exists() and not was_running:
            subprocess.run([program("pgtask"), "stop", "--server"], check=False, stdout=subprocess.DEVNULL)


def program(name: str) -> Path:
    """Return the path of a command of pgtask, which is installed beside this Python."""
    return Path(sys.executable).with_name(name)


@contextlib.asynccontextmanager
async def opened() -> AsyncIterator[tuple[Client, Any]]:
    """Open a client, and a separate connection to its database."""
    async with Client() as client:
        connection = await asyncpg.connect(client.dsn)
        try:
            yield client, connection
        finally:
            await connection.close()


async def burst(
    app: str, queue: str, *flags: str, kills: int = 0, progress: Callable[[], Awaitable[float]] | None = None
) -> int:
    """Run a supervisor of two workers until the queue is empty, and return its exit code.

    It kills a worker `kills` times, spread over the run: `progress` returns the share of the work that is done.
    """
    words = (app, "--queue", queue, "--procs", "2", "--burst", "--log-level", "error", *flags)
    print("$ pgtask-supervisor", *words, flush=True)
    supervisor = await asyncio.create_subprocess_exec(program("pgtask-supervisor"), *words)
    killed = 0
    try:
        while progress is not None and killed < kills and supervisor.returncode is None:
            if await progress() > (killed + 1) / (kills + 2):
                killed += kill_a_worker(supervisor.pid)
            await asyncio.sleep(0.01)
        code = await supervisor.wait()
    finally:
        if supervisor.returncode is None:
            supervisor.terminate()
            await supervisor.wait()
    if kills:
        print(f"killed a worker {killed} times")
    return code


def kill_a_worker(supervisor: int) -> bool:
    """Kill one process that this supervisor has forked, in the middle of its work. False if there is none."""
    with contextlib.suppress(psutil.NoSuchProcess):
        if children := psutil.Process(supervisor).children():
            random.choice(children).kill()
            return True
    return False


# --- HTTP, one request a connection


@contextlib.asynccontextmanager
async def serving(answer: Callable[[str, str, str], Awaitable[Answer]]) -> AsyncIterator[int]:
    """Serve HTTP on a free port of this machine, and yield the port. `answer` gets a host, a path and a body."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError, asyncio.IncompleteReadError):  # the client was killed
            first, headers = await read_head(reader)
            body = await reader.readexactly(int(headers["content-length"]))
            status, more, text = await answer(headers["host"], first.split()[1], body.decode())
            writer.write(as_bytes(f"HTTP/1.1 {status} -", more, text))
            await writer.drain()
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0, backlog=1000)
    try:
        yield server.sockets[0].getsockname()[1]
    finally:
        server.close()


async def request(port: int, host: str, path: str, body: str = "") -> Answer:
    """Send a request to the server on this port under the name of a host, and return its answer."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        writer.write(as_bytes(f"{'POST' if body else 'GET'} {path} HTTP/1.1", {"host": host}, body))
        first, headers = await read_head(reader)
        text = await reader.readexactly(int(headers["content-length"]))
    finally:
        writer.close()
    return int(first.split()[1]), headers, text.decode()


def as_bytes(first: str, headers: Headers, body: str) -> bytes:
    content = body.encode()
    lines = [first, *(f"{name}: {value}" for name, value in headers.items()), f"content-length: {len(content)}"]
    return "\r\n".join([*lines, "", ""]).encode() + content


async def read_head(reader: asyncio.StreamReader) -> tuple[str, Headers]:
    """Read the first line, and the headers by their names in lower case."""
    first, *lines = (await reader.readuntil(b"\r\n\r\n")).decode().strip().split("\r\n")
    return first, {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
