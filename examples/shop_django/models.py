"""The tables of the shop."""

from __future__ import annotations

from django.db import models


class Order(models.Model):
    item = models.TextField()
    count = models.IntegerField()
    confirmed_at = models.DateTimeField(null=True)
