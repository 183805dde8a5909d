"""A web shop with Flask and psycopg: an order and the task that mails about it are one transaction.

Order three times, of which the shop refuses one after it has enqueued the mail; then send the mails:

    python -m examples.shop_flask
    pgtask-supervisor examples.shop_flask:app --burst

Or serve it, and order with `curl -X POST 'localhost:5000/orders?product=cup&count=2'`:

    flask --app examples.shop_flask:make_web run
"""

from __future__ import annotations

import psycopg
from flask import Flask, abort, request
from flask.typing import ResponseReturnValue

from pgtask import App, Context, Done, SyncClient, Task

STOCK = 10
TABLE = "CREATE TABLE IF NOT EXISTS flask_order (id serial PRIMARY KEY, product text NOT NULL, count int NOT NULL)"


class Mails(Task):
    pass


class Confirm(Mails):
    order: int

    async def run(self, ctx: Context) -> Done:
        row = await ctx.db.fetchrow("SELECT product, count FROM flask_order WHERE id = $1", self.order)
        print(f"mail about order {self.order}: {row['count']} x {row['product']}")
        return Done()


app = App(Mails)
client = SyncClient()


def make_web() -> Flask:
    client.open()  # a forked server, such as gunicorn --preload, opens it again in each worker
    web = Flask(__name__)
    with psycopg.connect(client.dsn) as conn:
        conn.execute(TABLE)

    @web.post("/orders")
    def create_order() -> ResponseReturnValue:
        product, count = request.args["product"], int(request.args["count"])
        with psycopg.connect(client.dsn) as conn:  # commits at its end, or rolls back
            row = conn.execute(
                "INSERT INTO flask_order (product, count) VALUES (%s, %s) RETURNING id", (product, count)
            ).fetchone()
            assert row is not None
            task = client.enqueue(Confirm(row[0]), key=f"order {row[0]}", conn=conn)
            if count > STOCK:
                abort(409, f"there are only {STOCK}")  # neither the order nor the task stays
        return {"order": row[0], "task": str(task)}

    @web.get("/orders")
    def count_orders() -> ResponseReturnValue:
        with psycopg.connect(client.dsn) as conn:
            return str((conn.execute("SELECT count(*) FROM flask_order").fetchone() or [0])[0])

    return web


def main() -> None:
    browser = make_web().test_client()
    before = int(browser.get("/orders").text)
    for product, count in (("cup", 2), ("pot", 1000), ("pan", 1)):
        answer = browser.post("/orders", query_string={"product": product, "count": count})
        print(f"{count} x {product}: {answer.status_code} {answer.json or 'refused'}")
    print(f"orders: {int(browser.get('/orders').text) - before}")
    client.close()


if __name__ == "__main__":
    main()
