"""The parameters of libpq in a DSN, the environment and the service file: which we read, and which we refuse.

Invariants: a parameter of libpq is honoured, by asyncpg or by us, or refused by its name. No error quotes a value,
which may be a piece of a password. asyncpg gets none that it would pass on to the server as a setting.
"""

from __future__ import annotations

import configparser
import os
import re
from collections.abc import Callable, Mapping
from typing import NamedTuple
from urllib.parse import parse_qsl, unquote, urlsplit

__all__ = ["KNOWN", "Dialling", "Host", "check_parameter", "read_dialling"]

DEFAULT_PORT = "5432"
# A silent line is dead after idle + interval * count seconds, here 11.
IDLE, INTERVAL, COUNT = 5, 2, 3


class _Rule(NamedTuple):
    """The values that we accept of a parameter, what to write instead of another one, and libpq's variable for it."""

    values: str
    remedy: str
    variable: str | None = None


_SECONDS = r"0*([0-9]{1,4}|[12][0-9]{4}|3[01][0-9]{3}|32[0-6][0-9]{2}|327[0-5][0-9]|3276[0-7])"  # as Linux takes them

_OURS = {
    "connect_timeout": _Rule(
        "0*[1-9][0-9]{0,4}", "write whole seconds from 1: we wait for no host without end", "PGCONNECT_TIMEOUT"
    ),
    "target_session_attrs": _Rule(
        "any|read-write|read-only|primary|standby|prefer-standby",
        "write read-write, primary, any, read-only, standby or prefer-standby",
        "PGTARGETSESSIONATTRS",
    ),
    "load_balance_hosts": _Rule("disable|random", "write disable or random", "PGLOADBALANCEHOSTS"),
    "keepalives": _Rule(
        "0*[1-9][0-9]{0,8}", "without keepalives we would wait for a dead host without end; raise keepalives_idle"
    ),
    "keepalives_idle": _Rule(_SECONDS, "write seconds from 1 to 32767, or 0 for our default"),
    "keepalives_interval": _Rule(_SECONDS, "write seconds from 1 to 32767, or 0 for our default"),
    "keepalives_count": _Rule("0*([0-9]{1,2}|1[01][0-9]|12[0-7])", "write 1 to 127, or 0 for our default"),
    "tcp_user_timeout": _Rule("[0-9]{1,9}", "write milliseconds, or 0 for our default"),
}
"""What our own dialling does."""

_SPEAKS_SCRAM = "asyncpg has SCRAM without it; remove it, and write sslmode=verify-full to be sure of the server"
_NO_OAUTH = "asyncpg has no OAuth; use a password or a certificate"

_UNUSED = {
    "fallback_application_name": _Rule(".*", "remove it"),
    "channel_binding": _Rule("disable|prefer", _SPEAKS_SCRAM, "PGCHANNELBINDING"),
    "client_encoding": _Rule("(?i:utf-?8|unicode)", "pgtask speaks UTF8; remove it"),
    "gssencmode": _Rule("disable|prefer", "asyncpg encrypts by TLS only; write sslmode=require", "PGGSSENCMODE"),
    "gssdelegation": _Rule("0", "asyncpg delegates no credentials; remove it", "PGGSSDELEGATION"),
    "hostaddr": _Rule("", "write the address as the host", "PGHOSTADDR"),
    "max_protocol_version": _Rule("3\\.[0-9]|latest", "asyncpg speaks 3.0; remove it", "PGMAXPROTOCOLVERSION"),
    "min_protocol_version": _Rule("3\\.0", "asyncpg speaks 3.0; remove it", "PGMINPROTOCOLVERSION"),
    "oauth_client_id": _Rule("", _NO_OAUTH),
    "oauth_client_secret": _Rule("", _NO_OAUTH),
    "oauth_issuer": _Rule("", _NO_OAUTH),
    "oauth_scope": _Rule("", _NO_OAUTH),
    "replication": _Rule("(?i:0|off|no|false)", "a replication session runs no statements of ours; remove it"),
    "require_auth": _Rule("", "asyncpg takes any method; write sslmode=verify-full instead", "PGREQUIREAUTH"),
    "requirepeer": _Rule("", "asyncpg does not check it; let the directory of the socket do so", "PGREQUIREPEER"),
    "requiressl": _Rule("0", "write sslmode=require", "PGREQUIRESSL"),
    "scram_client_key": _Rule("", "asyncpg needs the password itself"),
    "scram_server_key": _Rule("", "asyncpg needs the password itself"),
    "servicefile": _Rule("", "set PGSERVICEFILE in the environment"),
    "sslcertmode": _Rule("allow", "asyncpg sends the certificate of sslcert, if there is one", "PGSSLCERTMODE"),
    "sslcompression": _Rule("0", "asyncpg does not compress; remove it", "PGSSLCOMPRESSION"),
    "sslcrldir": _Rule("", "write the lists into one file, for sslcrl", "PGSSLCRLDIR"),
    "sslkeylogfile": _Rule("", "set SSLKEYLOGFILE in the environment"),
    "sslsni": _Rule("1", "asyncpg always names the host to the server; remove it", "PGSSLSNI"),
}
"""What asyncpg does not have. The values that are accepted ask for nothing."""

_RULES = {**_OURS, **_UNUSED}

KNOWN = frozenset(_RULES)
"""The names for which there is a rule here."""

_HOST = re.compile(r"(?:\[([^\]]*)\]|([^:\[\]]*|[^\[\]]*:[^\[\]]*:[^\[\]]*?))(?::(\d{1,5}))?")


class Host(NamedTuple):
    """A host of a DSN with several: a name, an address, or the directory of a socket."""

    name: str
    port: int

    def __str__(self) -> str:
        if self.name.startswith("/"):
            return self.name
        return f"[{self.name}]:{self.port}" if ":" in self.name else f"{self.name}:{self.port}"


class Dialling(NamedTuple):
    """How a database is dialled. `dsn` is the text for asyncpg, without our own parameters."""

    dsn: str
    hosts: tuple[Host, ...]
    """Two or more; none if the DSN has one host, or leaves it to asyncpg."""
    connect_timeout: float | None
    """Seconds for each host, or None for the default."""
    session: str | None
    """`target_session_attrs`, or None for the default."""
    is_balanced: bool
    keepalive: Mapping[str, int]
    """The options of a TCP socket by their names in `socket`."""


def check_parameter(name: str, value: str, shown: str) -> None:
    """Raise `ValueError` if a parameter of libpq, as `shown` to people, cannot be honoured. Other names pass: they are
    asyncpg's, or settings of the server. So does an empty value, which stands for none."""
    rule = _RULES.get(name)
    if rule is not None and value and not re.fullmatch(rule.values, value):
        raise ValueError(f"{shown} cannot be honoured: {rule.remedy}")


def read_dialling(dsn: str) -> Dialling:
    """Read how to dial a DSN that has passed `check_dsn`, from it, its service and the environment, in this order.

    Raises `ValueError`, whose text may be shown, and `configparser.Error`."""
    place, mark, query = dsn.partition("?")
    options = dict(parse_qsl(query))
    service = _read_service(options.get("service") or os.environ.get("PGSERVICE"))
    for name in _RULES.keys() & service.keys():
        check_parameter(name, service[name], f"{name} of the service file")

    def given(name: str) -> str | None:
        return options.get(name) or service.get(name) or _from_environment(name)

    for name, rule in _UNUSED.items():
        if rule.variable is not None and name not in options:
            _from_environment(name)
    kept = [option for option in query.split("&") if option.partition("=")[0] not in _RULES]
    timeout = given("connect_timeout")
    return Dialling(
        dsn=place + (mark + "&".join(kept) if query and kept else ""),
        hosts=_read_hosts(dsn, options, service),
        connect_timeout=None if timeout is None else float(timeout),
        session=given("target_session_attrs"),
        is_balanced=given("load_balance_hosts") == "random",
        keepalive=_read_keepalive(given),
    )


def _read_service(name: str | None) -> Mapping[str, str]:
    """Return the parameters of a service, as asyncpg finds it."""
    if not name:
        return {}
    path = os.environ.get("PGSERVICEFILE") or os.path.expanduser("~/.pg_service.conf")
    services = configparser.ConfigParser()
    services.read(path)
    return services[name] if name in services.sections() else {}


def _from_environment(name: str) -> str | None:
    variable = _RULES[name].variable
    value = None if variable is None else os.environ.get(variable)
    if value:
        check_parameter(name, value, f"{variable} of the environment")
    return value or None


def _read_keepalive(given: Callable[[str], str | None]) -> Mapping[str, int]:
    """Return the options of the sockets. Data that is not acknowledged counts as a silent line does."""
    idle = int(given("keepalives_idle") or 0) or IDLE
    interval = int(given("keepalives_interval") or 0) or INTERVAL
    count = int(given("keepalives_count") or 0) or COUNT
    # A second less: else the line of which one probe was lost would be dead at the next one.
    timeout = int(given("tcp_user_timeout") or 0) or 1000 * (idle + interval * count - 1)
    return {
        "TCP_KEEPIDLE": idle,
        "TCP_KEEPALIVE": idle,  # of macOS
        "TCP_KEEPINTVL": interval,
        "TCP_KEEPCNT": count,
        "TCP_USER_TIMEOUT": timeout,
    }


def _read_hosts(dsn: str, options: Mapping[str, str], service: Mapping[str, str]) -> tuple[Host, ...]:
    """Return the hosts of a list of several, found where asyncpg finds them."""
    ports = options.get("port") or service.get("port") or os.environ.get("PGPORT") or DEFAULT_PORT
    netloc = urlsplit(dsn).netloc.rpartition("@")[2]
    text = netloc or options.get("host") or service.get("host") or os.environ.get("PGHOST") or ""
    if "," not in text:
        return ()
    names = [unquote(name) if netloc else name for name in text.split(",")]
    numbers = ports.split(",")
    if len(numbers) == 1:
        numbers *= len(names)
    if len(numbers) != len(names):
        raise ValueError(f"it has {len(names)} hosts and {len(numbers)} ports; write HOST:PORT,HOST:PORT")
    return tuple(map(_read_host, names, numbers))


def _read_host(text: str, port: str) -> Host:
    found = _HOST.fullmatch(text)
    name = text if text.startswith("/") else (found[1] or found[2]) if found else ""
    number = (found[3] if found and name != text else None) or port or DEFAULT_PORT
    if not name or not number.isdigit() or int(number) > 65535:
        raise ValueError("its list of hosts has an entry that is none; write HOST:PORT,HOST:PORT")
    return Host(name, int(number))
