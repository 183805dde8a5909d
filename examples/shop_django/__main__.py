"""Takes the orders, or shows them with the results of their tasks."""

from __future__ import annotations

import os
import sys

import django

os.environ.setdefault("DJANGO_SETTINGS_MODULE", "examples.shop_django.settings")
django.setup()

from django.core.management import call_command  # noqa: E402
from django.db import transaction  # noqa: E402

from examples.shop_django.models import Order  # noqa: E402
from examples.shop_django.tasks import confirm  # noqa: E402

STOCK = {"cup": 10, "pot": 1}


class OutOfStock(Exception):
    pass


def take(item: str, count: int) -> str:
    """Take an order, and enqueue its confirmation: both or neither. Returns the id of the result."""
    with transaction.atomic():
        order = Order.objects.create(item=item, count=count)
        result = confirm.enqueue(order.pk)
        if count > STOCK[item]:
            raise OutOfStock(item)  # rolls back the order, and the task with it
    return str(result.id)


def take_orders() -> None:
    call_command("migrate", run_syncdb=True, verbosity=0)  # its tables, and those of pgtask
    for item, count in (("cup", 2), ("pot", 3), ("pot", 1)):
        try:
            print(f"{count} x {item}: task {take(item, count)}")
        except OutOfStock:
            print(f"{count} x {item}: not in stock; no order, no task")


def show(ids: list[str]) -> None:
    for order in Order.objects.order_by("pk"):
        print(f"order {order.pk}: {order.count} x {order.item}, confirmed: {order.confirmed_at is not None}")
    for id in ids:
        result = confirm.get_result(id)
        print(f"task {id}: {result.status}, {result.return_value!r}")


if __name__ == "__main__":
    if sys.argv[1:2] == ["show"]:
        show(sys.argv[2:])
    elif sys.argv[1:]:
        sys.exit("usage: python -m examples.shop_django [show [ID ...]]")
    else:
        take_orders()
