"""Fan-out and fan-in: a run for each text file below a directory, and one run that combines their counts.

    python -m examples.word_count DIRECTORY & pgtask-supervisor examples.word_count:app --procs 4 --burst; wait

Each run reads its file in a thread. A file that cannot be read fails its own run, and the result names it. You repair
the file and resume that run by itself.
"""

from __future__ import annotations

import asyncio
import re
import sys
from collections import Counter
from pathlib import Path

import msgspec

from pgtask import App, Client, Policy, WorkflowContext, workflow

SUFFIXES = (".md", ".py", ".rst", ".txt")
TOP_WORDS = 10


class Report(msgspec.Struct):
    files: int
    words: int
    most_common: list[tuple[str, int]]
    unreadable: list[str]


def find_files(directory: str) -> list[str]:
    return sorted(str(path) for path in Path(directory).rglob("*") if path.suffix in SUFFIXES and path.is_file())


def count_words(path: str) -> dict[str, int]:
    return Counter(re.findall(r"[a-z]{4,}", Path(path).read_text(encoding="utf-8").lower()))


def put_together(paths: list[str], counts: list[dict[str, int] | None]) -> Report:
    total: Counter[str] = Counter()
    for count in counts:
        total.update(count or {})
    common = sorted(total.items(), key=lambda item: (-item[1], item[0]))[:TOP_WORDS]
    unreadable = [path for path, count in zip(paths, counts, strict=True) if count is None]
    return Report(len(paths), total.total(), common, unreadable)


@workflow("count_file", policy=Policy(retry_limit=0))
async def count_file(ctx: WorkflowContext, path: str) -> dict[str, int]:
    return await ctx.step("count", count_words, path)


@workflow("count_directory")
async def count_directory(ctx: WorkflowContext, directory: str) -> Report:
    paths = await ctx.step("find", find_files, directory)
    children = await ctx.spawn_many("files", count_file, paths)
    results = await ctx.results(children, return_exceptions=True)
    counts = [None if isinstance(result, Exception) else result for result in results]
    return await ctx.step("put together", put_together, paths, counts)


app = App(count_directory, count_file)


async def main(directory: str = ".") -> None:
    async with Client() as client:
        run = await client.trigger(count_directory, str(Path(directory).resolve()))
        report = await run.result()
    print(f"{report.words:,} words in {report.files:,} files: {', '.join(word for word, _ in report.most_common)}")
    for path in report.unreadable:
        print(f"could not be read: {path}")


if __name__ == "__main__":
    if len(sys.argv) > 2 or not Path(*sys.argv[1:]).is_dir():
        sys.exit("usage: python -m examples.word_count [DIRECTORY]")
    asyncio.run(main(*sys.argv[1:]))
