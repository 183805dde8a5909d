"""The tasks of the shop. With Django 6, `task` comes from `django.tasks`; before that, from the backport."""

from __future__ import annotations

import django
from django.utils import timezone

from examples.shop_django.models import Order

if django.VERSION >= (6, 0):
    from django.tasks import task
else:
    from django_tasks import task


@task(queue_name="mail", priority=10)
def confirm(order: int) -> str:
    """Confirm an order. It may run twice after a crash, so it writes what is so, and counts nothing."""
    found = Order.objects.get(pk=order)
    found.confirmed_at = timezone.now()
    found.save(update_fields=["confirmed_at"])
    return f"confirmed {found.count} x {found.item}"
