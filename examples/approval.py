"""An approval: an expense waits for a person, for a week at most. Meanwhile it costs you one row.

    python -m examples.approval 1200 && pgtask-supervisor examples.approval:app --procs 1
    pgtask runs --state PAUSED
    pgtask signal ID approval '{"approved": true, "by": "Ada"}'

The workflow pays small expenses at once. It refuses an expense if you do not decide within a week.
"""

from __future__ import annotations

import asyncio
import sys
from datetime import timedelta

import msgspec

from pgtask import App, Client, SignalTimeout, WorkflowContext, workflow

SMALL = 100


class Expense(msgspec.Struct):
    amount: int
    what: str = "a chair"


class Approval(msgspec.Struct):
    approved: bool
    by: str


async def ask(expense: Expense, run: str) -> None:
    print(f"please decide on {expense.what} for {expense.amount}: pgtask signal {run} approval ...")


async def pay(expense: Expense, key: str) -> str:
    """Pay the expense. A bank takes `key` as the idempotency key of the transfer, so the step may repeat."""
    print(f"paid {expense.amount} for {expense.what} ({key})")
    return f"paid {expense.amount}"


@workflow("expense")
async def expense(ctx: WorkflowContext, request: Expense) -> str:
    if request.amount > SMALL:
        await ctx.step("ask", ask, request, str(ctx.run_id))
        try:
            decision = await ctx.wait_for_signal("approval", Approval, timeout=timedelta(days=7))
        except SignalTimeout:
            return "refused: no decision in time"
        if not decision.approved:
            return f"refused by {decision.by}"
    return await ctx.step("pay", pay, request, ctx.idempotency_key("pay"))


app = App(expense)


async def main(amount: int = 1200) -> None:
    async with Client() as client:
        run = await client.trigger(expense, Expense(amount))
        print(run.id)


if __name__ == "__main__":
    words = sys.argv[1:] or ["1200"]
    if len(words) > 1 or not words[0].isdecimal():
        sys.exit("usage: python -m examples.approval [AMOUNT], a whole number")
    asyncio.run(main(int(words[0])))
