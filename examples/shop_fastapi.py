"""A web shop with FastAPI and SQLAlchemy: an order and the task that mails about it are one transaction.

Order three times, of which the shop refuses one after it has enqueued the mail; then send the mails:

    python -m examples.shop_fastapi
    pgtask-supervisor examples.shop_fastapi:app --burst

Or serve it, and order with `curl -X POST 'localhost:8000/orders?product=cup&count=2'`:

    uvicorn examples.shop_fastapi:web
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Annotated

import asyncpg
import httpx
from fastapi import Depends, FastAPI, HTTPException, Request
from sqlalchemy import func, select
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker, create_async_engine
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from pgtask import App, Client, Context, Done, Task

STOCK = 10


class Mails(Task):
    pass


class Confirm(Mails):
    order: int

    async def run(self, ctx: Context) -> Done:
        row = await ctx.db.fetchrow("SELECT product, count FROM fastapi_order WHERE id = $1", self.order)
        print(f"mail about order {self.order}: {row['count']} x {row['product']}")
        return Done()


app = App(Mails)


class Base(DeclarativeBase):
    pass


class Order(Base):
    __tablename__ = "fastapi_order"

    id: Mapped[int] = mapped_column(primary_key=True)
    product: Mapped[str]
    count: Mapped[int]


client = Client()


@asynccontextmanager
async def lifespan(web: FastAPI) -> AsyncIterator[None]:
    async with client:
        engine = create_async_engine("postgresql+asyncpg://", async_creator=lambda: asyncpg.connect(client.dsn))
        async with engine.begin() as connection:
            await connection.run_sync(Base.metadata.create_all)
        web.state.sessions = async_sessionmaker(engine, expire_on_commit=False)
        yield
        await engine.dispose()


web = FastAPI(lifespan=lifespan)


async def new_session(request: Request) -> AsyncIterator[AsyncSession]:
    async with request.app.state.sessions() as session:
        yield session


Session = Annotated[AsyncSession, Depends(new_session)]


@web.post("/orders")
async def create_order(product: str, count: int, session: Session) -> dict[str, object]:
    async with session.begin():
        order = Order(product=product, count=count)
        session.add(order)
        await session.flush()  # gives it its id
        task = await client.enqueue(Confirm(order.id), key=f"order {order.id}", conn=session)
        if count > STOCK:
            raise HTTPException(409, f"there are only {STOCK}")  # neither the order nor the task stays
    return {"order": order.id, "task": str(task)}


@web.get("/orders")
async def count_orders(session: Session) -> int:
    return await session.scalar(select(func.count()).select_from(Order)) or 0


async def main() -> None:
    async with lifespan(web), httpx.AsyncClient(transport=httpx.ASGITransport(web), base_url="http://shop") as browser:
        before = (await browser.get("/orders")).json()
        for product, count in (("cup", 2), ("pot", 1000), ("pan", 1)):
            answer = await browser.post("/orders", params={"product": product, "count": count})
            print(f"{count} x {product}: {answer.status_code} {answer.json()}")
        print(f"orders: {(await browser.get('/orders')).json() - before}")


if __name__ == "__main__":
    asyncio.run(main())
