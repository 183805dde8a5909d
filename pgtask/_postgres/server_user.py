"""The OS user that the embedded server runs as, and its programs under that user.

Invariants: it creates no user, and changes owner and mode only of the server's own files. A program gets no descriptor
of ours but the lock, no variable of our environment that may hold a secret, and a session of its own, so that Ctrl-C in
the terminal does not reach it. It gets a capability only if it needs one.
"""

from __future__ import annotations

import os
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

from pgtask.errors import EmbeddedError

if sys.platform != "win32":
    import pwd

__all__ = [
    "User",
    "check_private",
    "identities",
    "is_private",
    "make_private",
    "name_of",
    "require_name",
    "run",
    "server_user",
]

# The capabilities that open directories closed to the server's user, the lesser one first: search and read; or all
# access, since the root of a container mostly has only that.
_CAPABILITIES = ("dac_read_search", "dac_override")
_ENVIRONMENT = ("PATH", "TZ", "LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH")
# With these a container gives a name to a user without one.
_NAMES = ("NSS_WRAPPER_PASSWD", "NSS_WRAPPER_GROUP", "LD_PRELOAD")


class User(NamedTuple):
    uid: int
    gid: int


def server_user(data: Path) -> User:
    """Return the current user; for root, which Postgres refuses to run as, the owner of the data, else `nobody`."""
    owner = data.stat().st_uid if data.exists() else None
    if os.geteuid() != 0:
        if owner is not None and owner != os.geteuid():
            raise EmbeddedError(f"{data} belongs to {name_of(owner)}: run as that user or as root, or move it away")
        return User(os.geteuid(), os.getegid())
    if owner is not None and (data / "PG_VERSION").exists():
        if owner == 0:
            raise EmbeddedError(
                f"{data} belongs to root, as whom PostgreSQL refuses to run: give it to another user, "
                f"as in: chown -R nobody {data}"
            )
        try:
            return User(owner, pwd.getpwuid(owner).pw_gid)
        except KeyError:
            return User(owner, data.stat().st_gid)
    try:
        return User(*pwd.getpwnam("nobody")[2:4])
    except KeyError:
        raise EmbeddedError(
            "PostgreSQL refuses to run as root, and there is no user `nobody`: run as another user or set DATABASE_URL"
        ) from None


def identities(user: User) -> list[str]:
    """Return the OS users that may connect: root, and the user of the server. But not `nobody` on behalf of root: other
    daemons are `nobody` too, and a superuser of the server has all its rights."""
    names = [name_of(0)]
    if user.uid == os.geteuid() or name_of(user.uid) != "nobody":
        names.append(name_of(user.uid))
    return names


def name_of(uid: int) -> str:
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return str(uid)


def require_name(uid: int) -> None:
    """Raise `EmbeddedError` if the user has no name, without which PostgreSQL makes no data and no connection."""
    try:
        pwd.getpwuid(uid)
    except KeyError:
        raise EmbeddedError(
            f"the embedded PostgreSQL needs a name for the user {uid}, who has none: add a line for {uid} to "
            "/etc/passwd, preload nss_wrapper, run as another user, or set DATABASE_URL"
        ) from None


def make_private(path: Path, user: User) -> None:
    """Make a directory for the server's user alone. An existing one must be private to that user."""
    path.mkdir(mode=0o700, exist_ok=True)
    if os.geteuid() == 0 and path.lstat().st_uid == 0:
        _give_to_user(path, user)
    check_private(path, user)


def _give_to_user(path: Path, user: User) -> None:
    """Give an empty directory of root to the server's user: by its descriptor, so that it follows no link in its place,
    and only if it is empty, so that it gives away no other directory of root."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError:  # a link, or a file: for check_private
        return
    try:
        if os.fstat(descriptor).st_uid == 0 and not os.listdir(descriptor):
            os.fchown(descriptor, *user)
    finally:
        os.close(descriptor)


def check_private(path: Path, user: User) -> None:
    """Raise `EmbeddedError` unless a directory is private: below /tmp any user could have made it first, to listen
    there instead of the server."""
    if not is_private(path, user):
        raise EmbeddedError(f"{path} is not a private directory of {name_of(user.uid)}: remove it")


def is_private(path: Path, user: User) -> bool:
    status = path.lstat()
    return stat.S_ISDIR(status.st_mode) and status.st_uid == user.uid and not status.st_mode & 0o077


def run(user: User, command: list[str], *, data: Path, lock: int) -> subprocess.CompletedProcess[str]:
    """Run one of PostgreSQL's programs beside the data, with the lock. Output and errors are one text."""
    prefix, identity = _find_identity(user, Path(command[0]), data)
    return subprocess.run(
        [*prefix, *command],
        cwd=data.parent,
        env=_server_environment(),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,
        pass_fds=(lock,),
        **identity,
    )


def _find_identity(user: User, program: Path, data: Path) -> tuple[list[str], dict[str, Any]]:
    """Find a prefix for the command, and arguments for subprocess, that run it as the server's user with access to the
    program and the data. It tries them, since access depends on more than modes."""
    if os.geteuid() != 0:
        return [], {}
    plain: dict[str, Any] = {"user": user.uid, "group": user.gid, "extra_groups": []}
    if _has_access([], plain, program, data):
        return [], plain
    for capability in _CAPABILITIES:
        if _has_access(prefix := _with_capability(user, capability), {}, program, data):
            _close_to_others(data.parent)
            return prefix, {}
    raise EmbeddedError(
        f"for root, PostgreSQL runs as {name_of(user.uid)}, who cannot reach {program} and {data}: "
        "open the directories above them, run as another user, allow this container DAC_READ_SEARCH, "
        "or set DATABASE_URL"
    )


def _close_to_others(directory: Path) -> None:
    """Close a directory of root to other users: their processes must not steer a server with more rights."""
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        if os.fstat(descriptor).st_uid == 0:
            os.fchmod(descriptor, 0o700)
    finally:
        os.close(descriptor)


def _has_access(prefix: list[str], identity: dict[str, Any], program: Path, data: Path) -> bool:
    probe = [*prefix, "/bin/sh", "-c", 'test -x "$0" && test -w "$1"', str(program), str(data)]
    try:
        return subprocess.run(probe, env=_server_environment(), capture_output=True, **identity).returncode == 0
    except (OSError, subprocess.SubprocessError):  # there is no setpriv, or this process may not become another user
        return False


def _with_capability(user: User, capability: str) -> list[str]:
    return [
        *("setpriv", f"--reuid={user.uid}", f"--regid={user.gid}", "--clear-groups"),
        *(f"--inh-caps=+{capability}", f"--ambient-caps=+{capability}"),
        "--securebits=+no_setuid_fixup",  # else access(2), with which initdb looks for postgres, ignores it
        "--",
    ]


def _server_environment() -> dict[str, str]:
    """Return the environment of the server's processes: other users may be able to read it, and variables such as
    PGPORT would change the server's behaviour."""
    names = (*_ENVIRONMENT, *_NAMES) if "NSS_WRAPPER_PASSWD" in os.environ else _ENVIRONMENT
    return {"LC_ALL": "C", **{name: os.environ[name] for name in names if name in os.environ}}
