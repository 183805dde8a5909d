"""The text that names a database: its checks without a connection, and its form in messages.

Invariant: no message, log line or argument list shows a part of a password, also of a malformed text. Text
that may belong to a password is hidden. A text that passes `check_dsn` has one reading, which asyncpg and psql share,
so no later error can quote a piece of the password as something else.
"""

from __future__ import annotations

import re
from collections.abc import Container, Iterator, Sequence
from typing import Any
from urllib.parse import parse_qsl, unquote, unquote_plus, urlsplit

from pgtask._dsn_parameters import KNOWN, check_parameter

__all__ = ["check_dsn", "conceal", "conceal_arguments", "concealed_words", "names_database", "quoted", "redact"]

HIDDEN = "***"

_SCHEMES = ("postgresql://", "postgres://")
_DRIVERS = ("asyncpg", "psycopg", "psycopg2", "psycopg_async", "psycopg2cffi", "pg8000", "aiopg")
_OTHER_SCHEMES = (
    *("mysql", "mariadb", "sqlite", "mssql", "oracle", "redis", "rediss", "amqp", "mongodb", "cockroachdb"),
    *("http", "https", "tcp", "file", "jdbc:postgresql", "pgsql", "psql"),
    *(f"{name}+{driver}" for name in ("postgresql", "postgres") for driver in _DRIVERS),
)
_SCHEME = re.compile("(" + "|".join(re.escape(name) for name in ("postgresql", "postgres", *_OTHER_SCHEMES)) + ")://")

_SECRET = ("password", "sslpassword")
_HARMLESS = frozenset(
    (
        *("host", "port", "user", "dbname", "database", "service", "passfile", "application_name"),
        *("sslmode", "sslcert", "sslkey", "sslrootcert", "sslcrl", "sslnegotiation", "krbsrvname", "gsslib"),
        *("ssl_min_protocol_version", "ssl_max_protocol_version", "options", "search_path"),
        *(KNOWN - {"oauth_client_secret", "scram_client_key", "scram_server_key"}),
    )
)
_REMEDY = "percent-encode / ? # @ % [ ] and white space in a password, as %2F for /"

_HOST = re.compile(r"(\[[^\]]*\]|[^:\[\]]*)(:\d{0,5})?")
_PLAIN_HOSTS = re.compile(
    r"((\[[\da-fA-F:.]*\]|[\w.%-]*)(:\d{1,5})?)(,(\[[\da-fA-F:.]*\]|[\w.%-]*)(:\d{1,5})?)*(/[\w.%+~-]*)?"
)
_BAD_ESCAPE = re.compile("%(?![0-9a-fA-F]{2})")
_OPTION = re.compile(r"[A-Za-z_][\w.]*=.*")
_PAIR = re.compile(r"(\s*)(\w+)(\s*=\s*)('(?:\\.|[^'\\])*'|[^\s']\S*|)(?=\s|$)")
_SECRET_PAIR = re.compile(r"\s*(?:ssl)?password\s*=\s*", re.IGNORECASE)
_LOOKS_SECRET = re.compile(r"://|@|pass|pwd|secret", re.IGNORECASE)
_HOLDS_SECRET = re.compile(r"://|@|(pass|pwd|secret)\w*[^\w]", re.IGNORECASE)
MAX_MARK = 3  # a word of that length, such as ://, may be a piece of our own text
_SECRET_FLAG = re.compile(r"-.*(dsn|dns|ur[li]|pass|pwd|secret|database|db)", re.IGNORECASE)
_FLAG = re.compile(r"--?[\w-]+")
_SECRET_INSIDE = re.compile(r"(pass|pwd)\w*\s*=", re.IGNORECASE)
_ENCODED_MARK = re.compile("%(25)*(3a|40|3b|3d|26)", re.IGNORECASE)


# --- checks


def check_dsn(value: Any) -> str:
    """Return `value` if it may be a DSN. Raises `ValueError`, whose text and causes hold nothing of a password."""
    if not isinstance(value, str) or not value:
        raise ValueError("expected a text")
    if not value.startswith(_SCHEMES):
        other = _SCHEME.match(value)
        wrong = f"; {other[1]} is another scheme" if other else ""
        raise ValueError(
            f"use postgresql://USER@HOST/DATABASE, or postgresql:///DATABASE?host=/tmp for a socket{wrong}"
        )
    rest = value.partition("://")[2]
    authority = re.split("[/?#]", rest)[0]
    login, at, hosts = authority.rpartition("@")
    if re.search(r"\s|[\x00-\x1f\x7f]", rest):
        raise ValueError(f"it holds white space; {_REMEDY}")
    if "#" in rest or rest.count("@") > len(at):
        raise ValueError(f"it has a # or an @ where none may be; {_REMEDY}")
    if re.search(r"[\[\]]", login) or _BAD_ESCAPE.search(rest) or not _can_be_split(value):
        raise ValueError(f"it cannot be read; {_REMEDY}")
    if _ENCODED_MARK.search(login.partition(":")[0] + hosts):
        raise ValueError(
            "USER:PASSWORD@HOST is encoded as a whole; write its : and @ as they are, and encode the parts"
        )
    if _names_secret(rest.rpartition("@")[2].partition("?")[0]):
        raise ValueError("it has a password where none may be; write USER:PASSWORD@HOST, or ?password=")
    for host in hosts.split(","):
        found = _HOST.fullmatch(host)
        if not found or int((found[2] or ":")[1:] or 0) > 65535:
            if at:
                raise ValueError(f"{host} is not a host and a port")
            raise ValueError(f"what follows :// is neither HOST:PORT nor USER:PASSWORD@HOST:PORT; {_REMEDY}")
    _check_options(rest.partition("?")[2] if "?" in rest else None)
    return value


def _check_options(query: str | None) -> None:
    behind_secret = False
    for option in [] if query is None else query.split("&"):
        name = option.partition("=")[0]
        if not _OPTION.fullmatch(option):
            raise ValueError(f"its options, behind the ?, are not NAME=VALUE&NAME=VALUE; {_REMEDY}")
        if name not in _SECRET and name.lower() in _SECRET:
            raise ValueError(f"write its option {name} in lower case")
        if behind_secret and name not in _HARMLESS and name not in _SECRET:
            raise ValueError("an option behind its password is unknown: write that first, or & in a password as %26")
        check_parameter(name, unquote_plus(option.partition("=")[2]), f"its option {name}")
        behind_secret = behind_secret or name in _SECRET


def _can_be_split(value: str) -> bool:
    """Return true if Python's parser takes it; its error, which would quote the password, is dropped."""
    try:
        urlsplit(value)
    except ValueError:
        return False
    return True


# --- the form in messages


def redact(dsn: str) -> str:
    """Return the DSN without its password, and without any text that may be a piece of one."""
    scheme = _SCHEME.match(dsn)
    if scheme is None:
        return "".join(_shown_pairs(dsn))
    login, at, tail = dsn[scheme.end() :].rpartition("@")
    if "=" in login.partition("?")[2] or _names_secret(login):  # perhaps the @ is in an option, and so in a password
        return scheme[0] + HIDDEN
    if _ENCODED_MARK.search(login.partition(":")[0]):  # perhaps the password goes on behind the @
        return scheme[0] + _shown_login(login.partition(":")[0]).removesuffix(HIDDEN) + HIDDEN
    place, mark, query = tail.partition("?")
    is_plain = re.fullmatch(r"[^\s#;&=]*", place) if at else _PLAIN_HOSTS.fullmatch(place)
    if not is_plain or _ENCODED_MARK.search(place):
        return scheme[0] + _shown_login(login) + at + HIDDEN
    return scheme[0] + _shown_login(login) + at + place + mark + "&".join(_shown_options(query))


def _names_secret(text: str) -> bool:
    """Return true if the text holds `password=`, encoded any number of times."""
    while (decoded := unquote(text)) != text:
        text = decoded
    return _SECRET_INSIDE.search(text) is not None


def _shown_login(login: str) -> str:
    user = re.match(r"((?!%(25)*3a)[\w.%+~-])*", login, re.IGNORECASE)  # %3A is a : that was encoded with the rest
    assert user is not None
    rest = login[user.end() :]
    return user[0] + (f":{HIDDEN}" if rest.startswith(":") else HIDDEN if rest else "")


def _shown_options(query: str) -> Iterator[str]:
    """Yield the options up to the first that is not known to be harmless: the rest may belong to a password."""
    for option in query.split("&") if query else ():
        name, mark, value = option.partition("=")
        if mark and name.lower() in _SECRET:
            yield f"{name}={HIDDEN}"
        elif mark and name in _HARMLESS and re.fullmatch(r"[\w./%,:+\[\]~-]*", value) and not _names_secret(value):
            yield option
        else:
            yield HIDDEN
            return


def _shown_pairs(text: str) -> Iterator[str]:
    """Yield the parts of `host=... password=...`, the form of libpq, in the same way."""
    at = 0
    while at < len(text):
        pair = _PAIR.match(text, at)
        name = pair[2] if pair else ""
        if pair and name.lower() in _SECRET:
            yield pair[1] + name + pair[3] + HIDDEN
        elif pair and name in _HARMLESS and re.fullmatch(r"[\w./%,:+~-]*|'[\w./%,:+~ -]*'", pair[4]):
            yield pair[0]
        else:
            secret = _SECRET_PAIR.match(text, at)
            yield (secret[0] if secret else " " * (at > 0)) + HIDDEN
            return
        assert pair is not None
        at = pair.end()


def quoted(value: Any) -> str:
    """Return a value that a person has written in the wrong place as a message quotes it."""
    if isinstance(value, list):
        return f"[{', '.join(map(quoted, value))}]"
    if not _may_hold_password(value if isinstance(value, str) else repr(value)):
        return repr(value)
    return repr(redact(value)) if isinstance(value, str) else f"({type(value).__name__})"


def names_database(text: str) -> bool:
    """Return true if a word of a command line is a DSN, or was meant to be one."""
    return "://" in text or _SECRET_PAIR.search(text) is not None


def _may_hold_password(text: str) -> bool:
    """Return true if no message should quote a misplaced word."""
    return _LOOKS_SECRET.search(text) is not None


def _secrets_of(dsn: str) -> list[str]:
    """Return the passwords of a DSN that has passed `check_dsn`, encoded and decoded."""
    parts = urlsplit(dsn)
    login = parts.netloc.rpartition("@")[0]
    found = [login.partition(":")[2], *(value for name, value in parse_qsl(parts.query) if name in _SECRET)]
    found += [unquote(secret) for secret in found]
    found += [option.partition("=")[2] for option in parts.query.split("&") if option.partition("=")[0] in _SECRET]
    return sorted({secret for secret in found if secret}, key=len, reverse=True)


def conceal(text: str, dsn: str) -> str:
    """Remove the passwords of `dsn` from a text that is not ours, such as an error of the driver."""
    for secret in _secrets_of(dsn):
        if len(secret) > 3:  # a shorter one may be a piece of any word
            text = text.replace(secret, HIDDEN)
    return text


def conceal_arguments(message: str, words: Sequence[str]) -> str:
    """Remove the words of a command that may hold a password from a message about the command."""
    for word in words:
        value = _split_word(word)[1]
        shown = redact(value) if _HOLDS_SECRET.search(value) else value
        if shown != value and len(value) > MAX_MARK:
            for written in {repr(value)[1:-1], value}:
                whole = rf"(?<!\w){re.escape(written)}(?!\w)"
                message = re.sub(whole, shown.replace("\\", r"\\"), message, flags=re.IGNORECASE)
    return message


def concealed_words(words: Sequence[str], known: Container[str] = ()) -> list[str]:
    """Return the words of a command line as an error may quote them: text that may hold a password is hidden. A flag
    remains a flag, and a word that is `known` remains as it is."""
    concealed = []
    behind_secret_flag = False
    for word in words:
        flag, value = _split_word(word)
        is_flag = _FLAG.fullmatch(word) is not None
        is_secret = _may_hold_password(value) and not is_flag
        is_behind = (behind_secret_flag and not is_flag and word not in known) or _SECRET_FLAG.match(flag) is not None
        behind_secret_flag = is_flag and _SECRET_FLAG.match(word) is not None
        if is_secret and not value.startswith("-"):
            value = redact(value)
        elif is_secret or (is_behind and value):
            value = "-" * (value.startswith("-") and not flag) + HIDDEN
        concealed.append(flag + value)
    return concealed


def _split_word(word: str) -> tuple[str, str]:
    """Return `--flag=` and the text after it; an empty text and the word, if it does not begin so."""
    flag = _FLAG.match(word)
    end = flag.end() + 1 if flag and word[flag.end() : flag.end() + 1] == "=" else 0
    return word[:end], word[end:]
