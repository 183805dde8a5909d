"""The supervisors of other hosts, as the exporters at their `--metrics` ports describe them.

Invariant: one that does not answer is a part of the answer, never an exception; no question waits for it longer than
`PATIENCE`.
"""

from __future__ import annotations

import asyncio
import urllib.error
import urllib.request
from collections.abc import Sequence
from urllib.parse import urlsplit

import msgspec

from pgtask._observe.fleets import FLEET_PATH, SeenFleet

__all__ = ["RemoteFleets", "parse_address"]

PATIENCE = 2.0  # seconds
MAX_BYTES = 32 * 1024 * 1024
_EXAMPLE = "give the address of a --metrics port, as http://worker-7:9464"


def parse_address(text: str) -> str:
    """Return the address of an exporter without a path, from `worker-7:9464` or any address of one of its pages. Raises
    `ValueError`, which says what was expected."""
    try:
        parts = urlsplit(text if "://" in text else f"http://{text}")
        port = parts.port
    except ValueError:
        raise ValueError(f"{text} cannot be read: {_EXAMPLE}") from None
    if parts.scheme not in ("http", "https") or not parts.hostname or not text.isprintable() or " " in text:
        raise ValueError(f"{text} is no address: {_EXAMPLE}")
    if parts.username is not None or parts.password is not None:
        raise ValueError(f"an exporter asks for no password: {_EXAMPLE}")
    host = f"[{parts.hostname}]" if ":" in parts.hostname else parts.hostname
    return f"{parts.scheme}://{host}" + ("" if port is None else f":{port}")


class RemoteFleets:
    """The exporters at some addresses of `parse_address`, which are asked all at once."""

    def __init__(self, addresses: Sequence[str]) -> None:
        self._addresses = list(dict.fromkeys(addresses))
        # A proxy of the environment is for the world outside.
        self._open = urllib.request.build_opener(urllib.request.ProxyHandler({})).open

    async def sample(self) -> tuple[tuple[SeenFleet, ...], tuple[str, ...]]:
        """Return those that answer, and for each other one why it does not."""
        found = await asyncio.gather(*(asyncio.to_thread(self._ask, address) for address in self._addresses))
        return tuple(one for one in found if isinstance(one, SeenFleet)), tuple(
            one for one in found if isinstance(one, str)
        )

    def _ask(self, address: str) -> SeenFleet | str:
        try:
            with self._open(address + FLEET_PATH, timeout=PATIENCE) as answer:
                fleet = msgspec.json.decode(answer.read(MAX_BYTES), type=SeenFleet)
        except urllib.error.HTTPError as error:
            return f"{address}: no supervisor of this version of pgtask (it answers {error.code})"
        except (msgspec.MsgspecError, UnicodeDecodeError):
            return f"{address}: no supervisor of this version of pgtask"
        except TimeoutError:
            return f"{address}: no answer within {PATIENCE:g} s"
        except (OSError, ValueError) as error:
            reason = getattr(error, "reason", error)
            return f"{address}: {getattr(reason, 'strerror', None) or reason}"
        except Exception as error:  # of http.client: it speaks no HTTP
            return f"{address}: it answers no HTTP ({type(error).__name__})"
        return msgspec.structs.replace(fleet, host=urlsplit(address).netloc)
