"""Load a CSV file of deliveries exactly once: check each line, keep the latest price, and add up what was delivered.

    python -m examples.load
    python -m examples.load --lines 2000 --kills 2

By hand: `--lines 1000000 --kills 20`, or `--file deliveries.csv` with lines such as `cup,3,2.50,12`: a product, the
version of its price, the price, the quantity.

A quantity that is added twice is wrong, so no step here may take effect twice. Each step writes in `ctx.transaction()`,
which commits its rows together with the outcome of its task. The program reads the file again by itself at the end, and
compares its own sums with those in the table.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import random
import tempfile
import time
from collections.abc import Iterator, Sequence
from datetime import timedelta
from decimal import Decimal
from pathlib import Path
from typing import Any, TypeAlias
from uuid import UUID

from examples.demonstration import burst, database, opened, whole_number
from pgtask import App, Batch, BatchContext, Client, Context, Done, Next, Policy, Task

TABLES = """
    DROP TABLE IF EXISTS load_stock, load_rejects;
    CREATE TABLE load_stock (
        product text PRIMARY KEY, version integer, price numeric, lines bigint, quantity bigint
    );
    CREATE TABLE load_rejects (line integer, text text, reason text);
    DELETE FROM pg_task WHERE queue = 'load';
"""

# One statement for a batch. It sorts, so that two batches lock the products that they share in the same order. The
# latest version wins, and the rest is added: this is the part that must not happen twice.
UPSERT = """
    INSERT INTO load_stock AS stock
    SELECT product, max(version), (array_agg(price ORDER BY version DESC, price DESC))[1], count(*), sum(quantity)
    FROM unnest($1::text[], $2::integer[], $3::numeric[], $4::integer[]) AS line (product, version, price, quantity)
    GROUP BY product
    ORDER BY product
    ON CONFLICT (product) DO UPDATE
    SET price = CASE WHEN (excluded.version, excluded.price) > (stock.version, stock.price) THEN excluded.price
                     ELSE stock.price END,
        version = greatest(excluded.version, stock.version),
        lines = stock.lines + excluded.lines,
        quantity = stock.quantity + excluded.quantity
"""


class Load(Task):
    """The task of one line: Parse -> Store; or a row among the rejects."""

    policy = Policy(queue="load", retry_limit=2)


class Parse(Load):
    """Check the line. A line that is wrong is no error of the program, so it goes to a table with the reason."""

    line: int
    text: str

    async def run(self, ctx: Context) -> Next[Store] | Done:
        try:
            return Next(Store(*parsed(self.text)))
        except ValueError as error:
            async with ctx.transaction() as conn:
                await conn.execute("INSERT INTO load_rejects VALUES ($1, $2, $3)", self.line, self.text, str(error))
            return Done()


class Store(Load):
    """Store many lines by one statement, whose rows commit with the ends of all these tasks."""

    policy = Policy(queue="load", retry_limit=2, batch=Batch(500, linger=timedelta(milliseconds=200)))
    product: str
    version: int
    price: Decimal
    quantity: int

    @classmethod
    async def run_batch(cls, steps: Sequence[Store], ctx: BatchContext) -> Done:
        rows = [(step.product, step.version, step.price, step.quantity) for step in steps]
        async with ctx.transaction() as conn:
            await conn.execute(UPSERT, *map(list, zip(*rows, strict=True)))
        return Done()


app = App(Load)

Delivery: TypeAlias = tuple[str, int, Decimal, int]


def parsed(text: str) -> Delivery:
    """Read a line. Raises `ValueError` with what is wrong about it."""
    fields = text.split(",")
    if len(fields) != 4:
        raise ValueError(f"{len(fields)} fields in place of 4")
    product, version, price, quantity = fields
    if not product:
        raise ValueError("no product")
    if not (version.isdecimal() and quantity.isdecimal() and price.replace(".", "", 1).isdecimal()):
        raise ValueError("a field is no number")
    if max(len(version), len(quantity)) > 9:
        raise ValueError("a number is too large")
    return product, int(version), Decimal(price), int(quantity)


# --- the demonstration --------------------------------------------------------------------------------------------


def made(count: int) -> Iterator[str]:
    """Make lines: many of each product, some twice, some of a later version, and one of forty broken."""
    chance = random.Random(13)
    line = "cup,1,2.50,1"
    for _ in range(count):
        if chance.random() > 0.1:  # else the line before comes again
            version = chance.randrange(1, 10)
            product = chance.randrange(1 + count // 10)
            line = f"product {product},{version},{product % 90 + version}.50,{chance.randrange(1, 100)}"
        yield chance.choice(("", "too,short", ",1,1,1", "x,one,2.50,3")) if chance.random() < 0.025 else line


def lines_of(path: Path) -> Iterator[str]:
    with path.open(encoding="utf-8") as file:
        yield from (line.rstrip("\n") for line in file)


def expected(path: Path) -> tuple[dict[str, Any], set[Any]]:
    """Compute in Python what should be in the two tables."""
    stock: dict[str, Any] = {}
    rejects = set()
    for number, text in enumerate(lines_of(path), 1):
        try:
            product, version, price, quantity = parsed(text)
        except ValueError as error:
            rejects.add((number, text, str(error)))
            continue
        known, its_price, lines, total = stock.get(product, (version, price, 0, 0))
        stock[product] = (*max((known, its_price), (version, price)), lines + 1, total + quantity)
    return stock, rejects


async def enqueue(client: Client, connection: Any, path: Path) -> Sequence[UUID]:
    """Make the tables and a task for each line in one transaction: all of it, or nothing."""
    async with connection.transaction():
        await connection.execute(TABLES)
        steps = (Parse(number, text) for number, text in enumerate(lines_of(path), 1))
        return await client.enqueue_many(steps, conn=connection)


async def load(path: Path, kills: int) -> int:
    """Load the file, and compare the tables with it. Return 1 if anything differs."""
    began = time.monotonic()
    async with opened() as (client, connection):
        ids = await enqueue(client, connection, path)
        print(f"enqueued {len(ids):,} lines in {time.monotonic() - began:.1f} s")

        async def progress() -> float:
            return (await connection.fetchval("SELECT sum(lines) FROM load_stock") or 0) / (len(ids) or 1)

        flags = ("--lease-timeout", "10") if kills else ()
        code = await burst("examples.load:app", "load", *flags, kills=kills, progress=progress)
        seconds = time.monotonic() - began
        print(f"loaded in {seconds:.1f} s: {len(ids) / seconds:,.0f} lines/s, from the file to the last row")
        return code or await check(path, connection)


async def check(path: Path, connection: Any) -> int:
    """Compare each row of the tables with what Python says about the file."""
    stock, rejects = expected(path)
    found = {row["product"]: tuple(row)[1:] for row in await connection.fetch("SELECT * FROM load_stock")}
    found_rejects = [tuple(row) for row in await connection.fetch("SELECT * FROM load_rejects")]
    wrong = [product for product in stock.keys() | found.keys() if stock.get(product) != found.get(product)]
    for product in wrong[:10]:
        print(f"DIFFERENT: {product}: {found.get(product)}, but the file says {stock.get(product)}")
    if rejects_differ := sorted(found_rejects) != sorted(rejects):
        print(f"DIFFERENT: {len(found_rejects):,} rejects, but the file has {len(rejects):,}")
    same = len(stock.keys() | found.keys()) - len(wrong)
    print(f"checked against the file: {same:,} rows are the same, {len(wrong):,} differ")
    return 1 if wrong or rejects_differ else 0


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m examples.load", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--file", type=Path, help="the CSV file (default: a file that this program makes)")
    parser.add_argument("--lines", type=whole_number, default=10_000, help="lines to make (default: %(default)s)")
    parser.add_argument("--kills", type=whole_number, default=0, help="kill a worker so many times on the way")
    options = parser.parse_args()
    if options.file is not None and not os.access(options.file, os.R_OK):
        parser.error(f"{options.file} cannot be read")
    with tempfile.TemporaryDirectory() as directory, database():
        path = options.file
        if path is None:
            path = Path(directory, "deliveries.csv")
            path.write_text("".join(f"{line}\n" for line in made(options.lines)), encoding="utf-8")
        return asyncio.run(load(path, options.kills))


if __name__ == "__main__":
    raise SystemExit(main())
