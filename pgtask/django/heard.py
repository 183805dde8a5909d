"""Whether a signal of Django's tasks has to be sent: not if its only receiver is Django's own, which would log nothing.

A project without receivers of its own pays for its functions, and for no results that it never sees.
"""

from __future__ import annotations

import logging
from typing import Any

from pgtask.django.contract import signals

__all__ = ["is_heard", "is_only_logged"]


def _key_of(name: str) -> Any:
    """Return what Django knows a receiver of its own by; None in a version that has no such receiver."""
    receiver = getattr(signals, name, None)
    return None if receiver is None else (id(receiver), id(None))


_OWN = {
    id(signals.task_started): _key_of("log_task_started"),
    id(signals.task_finished): _key_of("log_task_finished"),
}
_logger: logging.Logger = signals.logger


def is_only_logged(signal: Any) -> bool:
    """Return whether nothing receives a signal but Django's own receiver, which logs it."""
    receivers = signal.receivers
    return len(receivers) == 1 and receivers[0][0] == _OWN.get(id(signal))


def is_heard(signal: Any, *, is_failure: bool) -> bool:
    """Return whether sending a signal has an effect."""
    return not is_only_logged(signal) or _logger.isEnabledFor(logging.ERROR if is_failure else logging.INFO)
