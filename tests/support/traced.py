"""Steps that are traced, and their producers: each process of them writes its spans as lines of JSON into a file.

python traced.py DSN ACT...    the producer: each act is within a span `request` of its own trace
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from datetime import timedelta
from typing import Any

import asyncpg
import psycopg
from opentelemetry import trace
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter, SpanExportResult
from opentelemetry.sdk.trace.sampling import ParentBased, TraceIdRatioBased

from pgtask import (
    App,
    Batch,
    BatchContext,
    Client,
    Context,
    Done,
    Enqueue,
    Fail,
    Next,
    Policy,
    SyncClient,
    Task,
    WorkflowContext,
    workflow,
)

SOON = timedelta(milliseconds=10)
tracer = trace.get_tracer("traced")


class LinesExporter(SpanExporter):
    """Appends spans to the file `SPANS`."""

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        with open(os.environ["SPANS"], "a") as file:
            file.writelines(json.dumps(_as_line(span)) + "\n" for span in spans)
        return SpanExportResult.SUCCESS


def _as_line(span: ReadableSpan) -> dict[str, Any]:
    assert span.context is not None
    return {
        "name": span.name,
        "kind": span.kind.name,
        "trace": span.context.trace_id,
        "id": span.context.span_id,
        "parent": None if span.parent is None else span.parent.span_id,
        "links": [link.context.span_id for link in span.links],
        "attributes": dict(span.attributes or {}),
        "status": span.status.status_code.name,
        "pid": os.getpid(),
    }


def set_provider() -> None:
    ratio = float(os.environ.get("RATIO", "1"))
    provider = TracerProvider(sampler=ParentBased(TraceIdRatioBased(ratio)))
    provider.add_span_processor(BatchSpanProcessor(LinesExporter()))
    trace.set_tracer_provider(provider)


class Traced(Task):
    """Steps with one trait each."""


class Plain(Traced):
    number: int = 0

    async def run(self, ctx: Context) -> Done:
        with tracer.start_as_current_span("inside"):
            return Done()


class Suspends(Traced):
    async def run(self, ctx: Context) -> Done:
        await asyncio.sleep(0.001)
        with tracer.start_as_current_span("inside"):
            await asyncio.sleep(0.001)
        return Done()


class InThread(Traced):
    def run(self, ctx: Context) -> Done:
        with tracer.start_as_current_span("inside"):
            return Done()


class FailsTwice(Traced):
    policy = Policy(retry_limit=2, retry_delay=SOON)

    async def run(self, ctx: Context) -> Done:
        if ctx.attempt < 3:
            raise LookupError(f"try {ctx.attempt}")
        return Done()


class TooLong(Traced):
    policy = Policy(timeout=SOON)

    async def run(self, ctx: Context) -> Done:
        await asyncio.sleep(60)
        return Done()


class Gives(Traced):
    async def run(self, ctx: Context) -> Fail:
        return Fail("it cannot be")


class Goes(Traced):
    async def run(self, ctx: Context) -> Next[Plain]:
        return Next(Plain())


class Fans(Traced):
    async def run(self, ctx: Context) -> Done:
        return Done(enqueue=[Plain(1), Enqueue(Plain(2), key="two")])


class ByClient(Traced):
    async def run(self, ctx: Context) -> Done:
        await ctx.client.enqueue(Plain())
        return Done()


class Together(Traced):
    policy = Policy(batch=Batch(size=3, linger=timedelta(seconds=20)))
    number: int

    @classmethod
    async def run_batch(cls, steps: Sequence[Together], ctx: BatchContext) -> Done:
        with tracer.start_as_current_span("inside"):
            return Done()


async def compute(number: int) -> int:
    with tracer.start_as_current_span("inside"):
        return number + 1


@workflow("count")
async def count(ctx: WorkflowContext, number: int) -> int:
    number = await ctx.step("first", compute, number)
    return await ctx.step("second", compute, number)


@workflow("parents")
async def parents(ctx: WorkflowContext, number: int) -> list[int]:
    return await ctx.results(await ctx.spawn_many("children", count, [number, number]))


@asynccontextmanager
async def lifespan() -> AsyncIterator[None]:
    if "SPANS" in os.environ and isinstance(trace.get_tracer_provider(), trace.ProxyTracerProvider):
        set_provider()
    yield


app = App(Traced, count, parents, lifespan=lifespan)

STEPS: dict[str, list[Task]] = {
    "plain": [Plain()],
    "suspends": [Suspends()],
    "in a thread": [InThread()],
    "fails": [FailsTwice()],
    "too long": [TooLong()],
    "gives": [Gives()],
    "goes": [Goes()],
    "fans": [Fans()],
    "by client": [ByClient()],
    "together": [Together(1), Together(2), Together(3)],
}


async def act_async(dsn: str, act: str) -> None:
    async with Client(dsn) as client:
        if act == "many":
            await client.enqueue_many([Plain(1), Plain(2), Enqueue(Plain(3), key="k"), Enqueue(Plain(4), after=SOON)])
        elif act == "many with keys":
            await client.enqueue_many([Plain(1), Plain(2)], key=lambda step: str(step.number))
        elif act == "key":
            await client.enqueue(Plain(), key="key")
        elif act == "rule":
            await client.enqueue(Plain(), key="rule", on_conflict="replace")
        elif act == "delay":
            await client.delay(Plain(), SOON)
        elif act == "trigger":
            await client.trigger(count, 1)
        elif act == "children":
            await client.trigger(parents, 1)
        elif act == "sampled":
            for _ in range(200):
                with tracer.start_as_current_span("root", context=trace.set_span_in_context(trace.INVALID_SPAN)):
                    await client.enqueue(Plain())
        elif act == "refused":
            await client.enqueue(Plain(), queue="no,queue")
        else:
            for step in STEPS[act]:
                await client.enqueue(step, queue="q")


async def act_as_consumer(dsn: str) -> None:
    """In a trace of its own."""
    async with Client(dsn, app=app) as client, client.consumer("q") as consumer:
        for _ in range(2):
            leases = await consumer.claim(wait=timedelta(seconds=20))
            for lease in leases:
                with lease.span() as span, tracer.start_as_current_span("inside"):
                    assert span is not None or not isinstance(trace.get_tracer_provider(), TracerProvider)
            await consumer.retry([lease for lease in leases if not lease.tried], after=SOON)
            await consumer.done([lease for lease in leases if lease.tried])


async def act_on_asyncpg(dsn: str) -> None:
    connection = await asyncpg.connect(dsn)
    async with connection.transaction():
        await Client(dsn).enqueue(Plain(), conn=connection)
    await connection.close()


def act_in_sync(dsn: str, act: str) -> None:
    if act == "sync many":
        with SyncClient(dsn) as client:
            client.enqueue_many([Plain(1), Plain(2)])
    elif act == "sync":
        with SyncClient(dsn) as client:
            client.enqueue(Plain())
    else:
        with psycopg.connect(dsn) as connection:
            SyncClient(dsn).enqueue(Plain(), conn=connection)
            SyncClient(dsn).enqueue_many([Plain(1), Plain(2)], conn=connection)


if __name__ == "__main__":
    if "SPANS" in os.environ:
        set_provider()
    _, dsn, *acts = sys.argv
    for act in acts:
        with tracer.start_as_current_span("request", attributes={"act": act}):
            if act.startswith("sync"):
                act_in_sync(dsn, act)
            else:
                others = {"asyncpg": act_on_asyncpg, "consume": act_as_consumer}
                asyncio.run(others[act](dsn) if act in others else act_async(dsn, act))
