"""Embed texts by a service that takes many at once, limits your calls, and refuses a whole call for one bad text.

    python -m examples.embed
    python -m examples.embed --texts 400 --kills 1

By hand: `--texts 100000 --kills 10`.

The service is a server in this program. It takes 96 texts and 4,000 tokens a call, of one model. If calls come too
fast, and now and then for no reason, it answers 429 and says how long you must wait. For a text that it refuses it
answers 400, and embeds none of the call. Nothing here handles that by hand: the worker calls again with halves, until
the bad text is alone and is parked.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from datetime import timedelta
from hashlib import sha256
from typing import Any
from uuid import UUID

from examples.demonstration import Answer, burst, database, opened, request, serving, whole_number
from pgtask import App, Batch, BatchContext, Client, Done, Next, Permanent, Policy, Task, Throttled

MAX_TEXTS = 96
MAX_TOKENS = 4_000
CALLS_PER_SECOND = 40
SOON = timedelta(milliseconds=50)

TABLES = """
    DROP TABLE IF EXISTS embed_vector;
    CREATE TABLE embed_vector (id integer, model text, vector real[]);
    DELETE FROM pg_task WHERE queue = 'embed';
"""


class Document(Task):
    """The task of one text: Embed -> Store."""

    policy = Policy(queue="embed", retry_limit=5)


class Embed(Document):
    """Ask the service for the vectors of many texts of one model."""

    policy = Policy(
        queue="embed",
        retry_limit=5,
        batch=Batch(MAX_TEXTS, linger=SOON, by="model", weight="tokens", max_weight=MAX_TOKENS),
    )
    id: int
    model: str
    text: str

    @property
    def tokens(self) -> int:
        return len(self.text) // 4

    @classmethod
    async def run_batch(cls, steps: Sequence[Embed], ctx: BatchContext) -> list[Next[Store]]:
        vectors = await ctx.resources.embed(steps[0].model, [step.text for step in steps])
        return [Next(Store(step.id, step.model, vector)) for step, vector in zip(steps, vectors, strict=True)]


class Store(Document):
    """Store vectors. The rows commit with the ends of their tasks, so a plain INSERT is enough."""

    policy = Policy(queue="embed", retry_limit=5, batch=Batch(500, linger=SOON))
    id: int
    model: str
    vector: list[float]

    @classmethod
    async def run_batch(cls, steps: Sequence[Store], ctx: BatchContext) -> Done:
        async with ctx.transaction() as conn:
            await conn.executemany(
                "INSERT INTO embed_vector VALUES ($1, $2, $3)", [(step.id, step.model, step.vector) for step in steps]
            )
        return Done()


class Service:
    """A client of the service. It turns what the service says into what a worker understands."""

    def __init__(self, port: int) -> None:
        self._port = port

    async def embed(self, model: str, texts: list[str]) -> list[list[float]]:
        """Return a vector for each text. Raises `Throttled`, and `Permanent` if the service refuses a text."""
        body = json.dumps({"model": model, "texts": texts})
        status, headers, answer = await request(self._port, "embed.example", "/embed", body)
        if status == 429:
            raise Throttled(float(headers["retry-after"]))  # costs no try, and the texts come back as a batch
        if status == 400:
            raise Permanent(answer)  # no retry helps; the worker finds the text that it is true of
        vectors: list[list[float]] = json.loads(answer)
        return vectors


@asynccontextmanager
async def lifespan() -> AsyncIterator[Service]:
    yield Service(int(os.environ["EMBED_PORT"]))


app = App(Document, lifespan=lifespan)


# --- the demonstration --------------------------------------------------------------------------------------------


class Provider:
    """The service itself, with its limits. It counts what it is asked."""

    def __init__(self) -> None:
        self.calls = self.texts = self.refused = self.throttled = self.wrong = 0
        self._asked = 0
        self._began = time.monotonic()
        self._spent = 0.0  # calls since then that were allowed, or would have been while it was idle

    def may_call(self) -> bool:
        """Allow so many calls a second, and ten at once; and refuse each ninth call."""
        self._asked += 1
        allowed = (time.monotonic() - self._began) * CALLS_PER_SECOND
        self._spent = max(self._spent, allowed - 10)
        if self._spent >= allowed or self._asked % 9 == 0:
            return False
        self._spent += 1
        return True

    async def answer(self, host: str, path: str, body: str) -> Answer:
        if not self.may_call():
            self.throttled += 1
            return 429, {"retry-after": "1"}, ""
        asked = json.loads(body)
        texts = asked["texts"]
        if len(texts) > MAX_TEXTS or sum(len(text) // 4 for text in texts) > MAX_TOKENS:
            self.wrong += 1
            return 400, {}, "too many texts or tokens"
        if any("\N{SKULL AND CROSSBONES}" in text for text in texts):
            self.refused += 1
            return 400, {}, "a text has a symbol that is not allowed"
        self.calls += 1
        self.texts += len(texts)
        await asyncio.sleep(0.02)  # a call takes its time
        return 200, {}, json.dumps([vector_of(asked["model"], text) for text in texts])


def vector_of(model: str, text: str) -> list[float]:
    return [byte / 256 for byte in sha256(f"{model} {text}".encode()).digest()[:8]]


def made(count: int) -> list[Embed]:
    """Make texts for two models. The service refuses one of 500."""
    return [
        Embed(
            id=number,
            model="small" if number % 3 else "large",
            text=f"text {number}: " + "word " * (number * 7 % 100) + "\N{SKULL AND CROSSBONES}" * (number % 500 == 77),
        )
        for number in range(count)
    ]


async def enqueue(client: Client, connection: Any, documents: list[Embed]) -> Sequence[UUID]:
    """Make the table and the tasks in one transaction."""
    async with connection.transaction():
        await connection.execute(TABLES)
        return await client.enqueue_many(documents, conn=connection)


async def embed(documents: list[Embed], kills: int) -> int:
    """Embed the texts, and compare the table with what it should hold. Return 1 if anything differs."""
    provider = Provider()
    async with opened() as (client, connection), serving(provider.answer) as port:
        os.environ["EMBED_PORT"] = str(port)
        began = time.monotonic()
        ids = await enqueue(client, connection, documents)

        async def progress() -> float:
            return float(await connection.fetchval("SELECT count(*) FROM embed_vector")) / (len(documents) or 1)

        flags = ("--lease-timeout", "10") if kills else ()
        code = await burst("examples.embed:app", "embed", *flags, kills=kills, progress=progress)
        print(f"embedded in {time.monotonic() - began:.1f} s")
        rows = await connection.fetch("SELECT id, model, vector FROM embed_vector")
        parked = await connection.fetch("SELECT id, error FROM pg_task WHERE id = ANY ($1)", ids)
    number_of = {id: number for number, id in enumerate(ids)}
    mean = provider.texts / (provider.calls or 1)
    print(f"{provider.calls:,} calls of {mean:.1f} texts in the mean; {provider.throttled:,} had to wait")
    print(f"{provider.refused:,} calls had a bad text; {provider.wrong:,} were over a limit; parked: {len(parked):,}")
    if code not in (0, 1):  # 1 says that some task is parked, as it should be
        return code
    return check(documents, rows, {number_of[row["id"]]: row["error"] for row in parked})


def check(documents: list[Embed], rows: list[Any], parked: dict[int, str]) -> int:
    """Compare the rows and the parked texts with those that there should be."""
    bad = {one.id for one in documents if "\N{SKULL AND CROSSBONES}" in one.text}
    wanted = sorted((one.id, one.model, vector_of(one.model, one.text)) for one in documents if one.id not in bad)
    found = sorted((row["id"], row["model"], row["vector"]) for row in rows)
    for number in sorted(parked.keys() ^ bad):
        print(f"DIFFERENT: text {number} should {'' if number in bad else 'not '}be parked: {parked.get(number)}")
    if found != wanted:
        texts = len({row[0] for row in found})
        print(f"DIFFERENT: {len(found):,} vectors of {texts:,} texts are not those of the {len(wanted):,} good texts")
        return 1
    print(f"checked: {len(found):,} texts are embedded exactly once, {len(parked):,} bad ones are parked")
    return 1 if parked.keys() != bad else 0


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m examples.embed", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--texts", type=whole_number, default=3_000, help="texts to embed (default: %(default)s)")
    parser.add_argument("--kills", type=whole_number, default=0, help="kill a worker so many times on the way")
    options = parser.parse_args()
    with database():
        return asyncio.run(embed(made(options.texts), options.kills))


if __name__ == "__main__":
    raise SystemExit(main())
