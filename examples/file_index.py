"""Index a directory tree: the size, the lines and the SHA-256 of each file, in the table `file_index`.

    python -m examples.file_index [DIRECTORY]

The first half is an app as you would write one: a task for each file. The edges between its steps are the things that
may happen to a file. The second half is the demonstration. It enqueues a whole tree (default: Python's standard
library), runs the supervisor over it, and compares every row with the output of `sha256sum` and `wc -l`.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
import shutil
import stat
import subprocess
import sys
import sysconfig
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any
from uuid import UUID

import asyncpg

from pgtask import App, Client, Context, Done, Fail, Next, Policy, Task

MAX_LOOKS = 5


class FileIndex(Task):
    """The task of one file: Read -> Digest -> Store; or Forget, if the file has disappeared.

    The file stays on the disk: a row carries its name and the facts found so far. Nothing here handles a file that you
    may not read: the error parks the task, and stays in its row until you give the permission and retry the task.
    """

    policy = Policy(queue="file_index", retry_limit=2, retry_delay=timedelta(seconds=1))


class Read(FileIndex):
    """Read the size and time of the file. Put blocking calls into a plain `def run`: it has a thread of its own."""

    path: str
    looks: int = 0

    def run(self, ctx: Context) -> Next[Digest] | Next[Forget] | Fail:
        if self.looks == MAX_LOOKS:
            return Fail(f"{self.path} changes all the time")
        try:
            state = os.lstat(self.path)
        except FileNotFoundError:
            return Next(Forget(self.path))
        if not stat.S_ISREG(state.st_mode):
            return Next(Forget(self.path))
        return Next(Digest(self.path, self.looks + 1, state.st_size, state.st_mtime_ns))


class Digest(FileIndex):
    """Hash the file and count its lines. If it has changed since Read, read it again a second later."""

    path: str
    looks: int
    size: int
    modified: int

    def run(self, ctx: Context) -> Next[Store] | Next[Read]:
        sha256, lines = hashlib.sha256(), 0
        try:
            with open(self.path, "rb") as file:
                while chunk := file.read(256 * 1024):
                    sha256.update(chunk)
                    lines += chunk.count(b"\n")
                state = os.fstat(file.fileno())
        except FileNotFoundError:
            return Next(Read(self.path, self.looks))
        if (state.st_size, state.st_mtime_ns) != (self.size, self.modified):
            return Next(Read(self.path, self.looks), after=timedelta(seconds=1))
        return Next(Store(self.path, sha256.hexdigest(), lines, self.size))


class Store(FileIndex):
    """Store the facts. A step may run twice if its worker dies, so it writes the same row the second time."""

    path: str
    sha256: str
    lines: int
    size: int

    async def run(self, ctx: Context) -> Done:
        await ctx.db.execute(
            """
            INSERT INTO file_index (path, sha256, lines, bytes)
            VALUES ($1, $2, $3, $4)
            ON CONFLICT (path) DO UPDATE
            SET sha256 = excluded.sha256,
                lines = excluded.lines,
                bytes = excluded.bytes
            """,
            self.path,
            self.sha256,
            self.lines,
            self.size,
        )
        return Done()


class Forget(FileIndex):
    path: str

    async def run(self, ctx: Context) -> Done:
        await ctx.db.execute("DELETE FROM file_index WHERE path = $1", self.path)
        return Done()


app = App(FileIndex)


# --- the demonstration --------------------------------------------------------------------------------------------

EMBEDDED = Path(".pgtask/data/postmaster.pid")  # exists while the embedded server runs


def main(root: str | None = None) -> int:
    """Index `root`, print a summary, check it; return 1 if anything differs. Stop the server if this has started it."""
    root = os.path.abspath(root or sysconfig.get_path("stdlib"))
    if not os.path.isdir(root):
        print(f"{root} is not a directory", file=sys.stderr)
        return 2
    was_running = EMBEDDED.exists()
    try:
        return demonstrate(root)
    finally:
        if EMBEDDED.exists() and not was_running:
            run("pgtask", "stop", "--server")


def demonstrate(root: str) -> int:
    if code := run("pgtask", "migrate"):
        return code
    began = time.time()
    files = [path for path in regular_files(root) if is_utf8(path)]
    print(f"enqueueing a task for each of {len(files):,} files", flush=True)
    ids = asyncio.run(enqueue(root, files))
    code = run("pgtask-supervisor", "examples.file_index:app", "--queue", "file_index", "--procs", "2", "--burst")
    if code not in (0, 1):  # 1 says that some task is parked: the list follows below
        return code
    rows, parked = asyncio.run(look(root, ids))
    seconds = time.time() - began
    lines, size = sum(row["lines"] for row in rows), sum(row["bytes"] for row in rows)
    print(f"{root}: {len(rows):,} files, {lines:,} lines, {size:,} bytes")
    print(f"indexed in {seconds:.1f} s: {len(rows) / seconds:,.0f} files/s, from the walk of the tree to the last row")
    for row in parked:
        print(f"not indexed: {row['path']}: {row['error'].partition(' (at ')[0]}")
    print("asking sha256sum and wc -l about every file", flush=True)
    indexed = {row["path"]: (row["sha256"], str(row["lines"])) for row in rows}
    return check([path for path in files if path not in {row["path"] for row in parked}], indexed, began)


def run(program: str, *arguments: str) -> int:
    """Run a command of pgtask that is installed beside this Python."""
    print("$", program, *arguments, flush=True)
    return subprocess.run([Path(sys.executable).with_name(program), *arguments], check=False).returncode


def regular_files(root: str) -> Iterator[str]:
    """List the files. Skip links, and the packages below the standard library, which may be many times its size."""
    for directory, below, names in os.walk(root, onerror=lambda error: print(f"not indexed: {error}")):
        below[:] = [name for name in below if name not in ("site-packages", "dist-packages")]
        for path in (os.path.join(directory, name) for name in names):
            if os.path.isfile(path) and not os.path.islink(path):
                yield path


def is_utf8(path: str) -> bool:
    """Test the name, and report one that is not UTF-8: a step is JSON, which cannot hold it."""
    try:
        path.encode()
    except UnicodeEncodeError:
        print(f"not indexed: {os.fsencode(path)!r}: the name is not UTF-8")
        return False
    return True


@asynccontextmanager
async def opened() -> AsyncIterator[tuple[Client, Any]]:
    """Open a client, and a separate connection to its database."""
    async with Client() as client:
        connection = await asyncpg.connect(client.dsn)
        try:
            yield client, connection
        finally:
            await connection.close()


async def enqueue(root: str, files: list[str]) -> Sequence[UUID]:
    """Enqueue a task for each file that exists now, or did before; all of them in one transaction, or none."""
    async with opened() as (client, connection), connection.transaction():
        await connection.execute(
            "CREATE TABLE IF NOT EXISTS file_index (path text PRIMARY KEY, sha256 text, lines bigint, bytes bigint)"
        )
        known = await connection.fetch("SELECT path FROM file_index WHERE starts_with(path, $1 || '/')", root)
        # Retry the tasks that an earlier run has parked. They keep their keys, so no second task comes for their files.
        await connection.execute(
            "UPDATE pg_task SET error = NULL, tried = 0 WHERE queue = 'file_index' AND error IS NOT NULL"
        )
        return await client.enqueue_many(
            map(Read, dict.fromkeys([*files, *(row["path"] for row in known)])),
            key=lambda step: hashlib.sha256(step.path.encode()).hexdigest(),
            conn=connection,
        )


async def look(root: str, ids: Sequence[UUID]) -> tuple[list[Any], list[Any]]:
    """Fetch the rows of the index, and the tasks of this run that are parked."""
    async with opened() as (_, connection):
        return (
            await connection.fetch("SELECT * FROM file_index WHERE starts_with(path, $1 || '/')", root),
            await connection.fetch(
                """
                SELECT jsonb_path_query_first(step::jsonb, '$.*.*.path') #>> '{}' AS path, error
                FROM pg_task
                WHERE id = ANY ($1) AND error IS NOT NULL
                """,
                ids,
            ),
        )


def check(files: list[str], indexed: dict[str, tuple[str, str]], began: float) -> int:
    """Compare every file with sha256sum and wc. Return 1 if a file differs that has not changed since `began`."""
    sums = ask(["sha256sum"] if shutil.which("sha256sum") else ["shasum", "-a", "256"], files)
    counts = ask(["wc", "-l"], files)
    same = wrong = 0
    for path in files:
        if path in indexed and indexed[path] == (sums.get(path), counts.get(path)):
            same += 1
        elif not os.path.exists(path) or os.stat(path).st_ctime >= began:
            print(f"not checked: {path} has changed meanwhile")
        else:
            wrong += 1
            print(f"DIFFERENT: {path}: {indexed.get(path)}, but the tools say {sums.get(path)}, {counts.get(path)}")
    print(f"checked against sha256sum and wc -l: {same:,} files are the same, {wrong:,} differ")
    return 1 if wrong else 0


def ask(tool: list[str], paths: list[str]) -> dict[str, str]:
    """Run `tool` on the files, and return the first word that it prints for each."""
    # The tools escape names with such characters, each in its own way, so they get these files on standard input.
    odd = {path for path in paths if set(path) & set("\\\n\r")}
    names = "\0".join(path for path in paths if path not in odd)
    said = subprocess.run(["xargs", "-0", *tool], input=names.encode(), stdout=subprocess.PIPE, check=False).stdout
    answers = {}
    for line in said.decode().split("\n"):
        answer, slash, name = line.partition("/")
        if slash:  # else a total, or the empty last line
            answers[slash + name] = answer.split()[0]
    for path in filter(os.path.exists, odd):
        with open(path, "rb") as file:
            said = subprocess.run(tool, stdin=file, stdout=subprocess.PIPE, check=True).stdout
        answers[path] = said.decode().split()[0]
    return answers


if __name__ == "__main__":
    raise SystemExit(main(*sys.argv[1:]))
