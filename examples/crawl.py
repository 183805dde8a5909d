"""Crawl the pages of many hosts that link to each other: each page is stored exactly once.

    python -m examples.crawl
    python -m examples.crawl --hosts 10 --pages 10 --kills 2

By hand: `--hosts 200 --pages 100 --kills 10`.

The pages are those of a server in this program, which answers for all hosts. It asks you to wait now and then, as busy
servers do. Each page is a task, which enqueues the links that are new. A key would keep a page from being enqueued
twice only while its task is in the table, so the crawl notes the pages that it knows in a table of its own.
`ctx.transaction()` writes these notes and the text of the page, and commits both with the outcome, which has the new
tasks in it. So there is no moment at which a page is noted and not enqueued.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import time
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any
from urllib.parse import urlsplit
from zlib import crc32

from examples.demonstration import Answer, burst, database, opened, request, serving, whole_number
from pgtask import App, Client, Context, Done, Enqueue, Fail, Policy, Task, Throttled

TABLES = """
    DROP TABLE IF EXISTS crawl_known, crawl_page;
    CREATE TABLE crawl_known (url text PRIMARY KEY);
    CREATE TABLE crawl_page (url text, text text);
    DELETE FROM pg_task WHERE queue = 'crawl';
"""

STORE = "INSERT INTO crawl_page VALUES ($1, $2)"

# Return the links that no other page has noted before. Two pages that are stored at the same time may have the same new
# links. Then one of them waits for the other, and since the links are sorted, never each for the other.
NOTE = """
    INSERT INTO crawl_known SELECT DISTINCT link FROM unnest($1::text[]) AS link ORDER BY link
    ON CONFLICT DO NOTHING
    RETURNING url
"""


class Crawl(Task):
    """The task of one page."""

    policy = Policy(queue="crawl", retry_limit=5)


class Fetch(Crawl):
    """Fetch the page, store it, and enqueue the pages that it is the first to link to."""

    url: str

    async def run(self, ctx: Context) -> Done | Fail:
        status, headers, text = await ctx.resources.get(self.url)
        if status == 503:  # as often as the server likes: it costs no try
            raise Throttled(float(headers["retry-after"]), f"{self.url} is busy")
        if status != 200:
            return Fail(f"status {status}")
        async with ctx.transaction() as conn:
            await conn.execute(STORE, self.url, text)
            fresh = [row["url"] for row in await conn.fetch(NOTE, json.loads(text)["links"])]
        return Done(enqueue=[Enqueue(Fetch(link), key=link) for link in fresh])


class Web:
    """A client of HTTP for all hosts, which are those of one server here."""

    def __init__(self, port: int) -> None:
        self._port = port

    async def get(self, url: str) -> Answer:
        parts = urlsplit(url)
        return await request(self._port, parts.netloc, parts.path)


@asynccontextmanager
async def lifespan() -> AsyncIterator[Web]:
    yield Web(int(os.environ["CRAWL_PORT"]))


app = App(Crawl, lifespan=lifespan)


# --- the demonstration --------------------------------------------------------------------------------------------


class Hosts:
    """The pages of some hosts: `answer` serves them, and one of ten pages is busy when it is first asked for."""

    def __init__(self, hosts: int, pages: int) -> None:
        self._hosts, self._pages = hosts, pages
        self.asked: Counter[str] = Counter()
        self.busy = 0

    def links(self, url: str) -> list[str]:
        """Return the links of a page: a next page of its host, and three others anywhere, perhaps the page itself."""
        host, page = (int(part) for part in url.removeprefix("http://host-").split(".example/"))
        chance = crc32(url.encode())
        some = [(chance // number % self._hosts, chance // number // 7 % self._pages) for number in (1, 101, 1009)]
        places = [(host, (page + 1) % self._pages), ((host + 1) % self._hosts, 0), *some]
        return [f"http://host-{host}.example/{page}" for host, page in places]

    async def answer(self, host: str, path: str, body: str) -> Answer:
        url = f"http://{host}{path}"
        self.asked[url] += 1
        if crc32(path.encode() + host.encode()) % 10 == 0 and self.asked[url] == 1:
            self.busy += 1
            return 503, {"retry-after": "1"}, ""
        await asyncio.sleep(0.01)  # a page takes its time
        return 200, {}, json.dumps({"links": self.links(url)})

    def reachable(self, start: str) -> set[str]:
        """Return the pages that a crawl from this one must find."""
        known, fresh = {start}, [start]
        while fresh:
            links = {link for url in fresh for link in self.links(url)}
            fresh = list(links - known)
            known |= links
        return known


async def enqueue(client: Client, connection: Any, start: str) -> None:
    """Make the table and enqueue the first page in one transaction."""
    async with connection.transaction():
        await connection.execute(TABLES)
        await connection.execute(NOTE, [start])
        await client.enqueue(Fetch(start), key=start, conn=connection)


async def crawl(hosts: Hosts, kills: int) -> int:
    """Crawl from a first page, and compare the table with the pages there are. Return 1 if anything differs."""
    start = "http://host-0.example/0"
    pages = hosts.reachable(start)
    async with opened() as (client, connection), serving(hosts.answer) as port:
        os.environ["CRAWL_PORT"] = str(port)
        began = time.monotonic()
        await enqueue(client, connection, start)

        async def progress() -> float:
            return float(await connection.fetchval("SELECT count(*) FROM crawl_page")) / len(pages)

        flags = ("--lease-timeout", "10") if kills else ()
        code = await burst("examples.crawl:app", "crawl", *flags, kills=kills, progress=progress)
        seconds = time.monotonic() - began
        stored = Counter(row["url"] for row in await connection.fetch("SELECT url FROM crawl_page"))
    print(f"crawled {len(stored):,} pages in {seconds:.1f} s: {len(stored) / seconds:,.0f} pages/s")
    print(f"asked {hosts.asked.total():,} times; {hosts.busy:,} times the server was busy")
    return code or check(pages, stored)


def check(pages: set[str], stored: Counter[str]) -> int:
    """Compare what was stored with the pages that there are."""
    wrong = [url for url in pages | stored.keys() if stored[url] != 1 or url not in pages]
    for url in wrong[:10]:
        print(f"DIFFERENT: {url} was stored {stored[url]} times")
    same = len(pages | stored.keys()) - len(wrong)
    print(f"checked against the links: {same:,} pages were stored exactly once, {len(wrong):,} differ")
    return 1 if wrong else 0


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m examples.crawl", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--hosts", type=whole_number, default=40, help="the number of hosts (default: %(default)s)")
    parser.add_argument("--pages", type=whole_number, default=10, help="pages of each host (default: %(default)s)")
    parser.add_argument("--kills", type=whole_number, default=0, help="kill a worker so many times on the way")
    options = parser.parse_args()
    if not options.hosts or not options.pages:
        parser.error("a crawl takes at least one host with one page")
    with database():
        return asyncio.run(crawl(Hosts(options.hosts, options.pages), options.kills))


if __name__ == "__main__":
    raise SystemExit(main())
