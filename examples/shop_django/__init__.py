"""A shop in Django: an order and its task are one transaction, so neither is ever there without the other.

    python -m examples.shop_django                                  # takes three orders; one of them fails
    DJANGO_SETTINGS_MODULE=examples.shop_django.settings pgtask-supervisor --procs 2 --burst
    python -m examples.shop_django show

The database is the one that DATABASE_URL names, as in `postgresql://USER@HOST/DATABASE`.
"""
