"""Whom the embedded server runs as, and how its programs are run as that user.

Invariants: no user is created, and nothing that is not the server's own is chowned or chmod-ed. A program
gets no descriptor of ours but the lock, nothing of our environment that may hold a secret, and a session of
its own, so that Ctrl-C in the terminal does not reach it. It gets a capability only where it cannot do
without.
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

__all__ = ["User", "check_private", "identities", "make_private", "run", "server_user"]

# What opens directories that are closed to the server's user, the lesser one first: search and read; or all
# access, since the root of a container mostly has only that.
_CAPABILITIES = ("dac_read_search", "dac_override")
_ENVIRONMENT = ("PATH", "TZ", "LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH")


class User(NamedTuple):
    uid: int
    gid: int


def server_user(data: Path) -> User:
    """Us; or if we are root, as whom Postgres refuses to run, the owner of the data, else `nobody`."""
    owner = data.stat().st_uid if data.exists() else None
    if os.geteuid() != 0:
        if owner is not None and owner != os.geteuid():
            raise EmbeddedError(f"{data} belongs to {_name(owner)}: run as that user or as root, or move it away")
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
    """The users of the operating system who may connect: root, and whom the server runs as. But not `nobody`
    on root's behalf: other daemons are `nobody` too, and a superuser of it can do what the server can."""
    names = [_name(0)]
    if user.uid == os.geteuid() or _name(user.uid) != "nobody":
        names.append(_name(user.uid))
    return names


def _name(uid: int) -> str:
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return str(uid)


def make_private(path: Path, user: User) -> None:
    """A directory for the server's user alone. One that is there already must be so."""
    path.mkdir(mode=0o700, exist_ok=True)
    if path.lstat().st_uid == os.geteuid() == 0:
        os.chown(path, *user, follow_symlinks=False)
    check_private(path, user)


def check_private(path: Path, user: User) -> None:
    """Below /tmp anybody could have made it before us, to listen there in our stead."""
    status = path.lstat()
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != user.uid or status.st_mode & 0o077:
        raise EmbeddedError(f"{path} is not a private directory of {_name(user.uid)}: remove it")


def run(user: User, command: list[str], *, data: Path, lock: int) -> subprocess.CompletedProcess[str]:
    """Run one of PostgreSQL's programs beside the data, with the lock. Its output and errors are one text."""
    prefix, identity = _way(user, Path(command[0]), data)
    return subprocess.run(
        [*prefix, *command],
        cwd=data.parent,
        env=_environment(),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,
        pass_fds=(lock,),
        **identity,
    )


def _way(user: User, program: Path, data: Path) -> tuple[list[str], dict[str, Any]]:
    """How to become the server's user so that it reaches the program and the data: a prefix for the command
    and arguments for subprocess. Tried, not computed: access depends on more than modes."""
    if os.geteuid() != 0:
        return [], {}
    plain: dict[str, Any] = {"user": user.uid, "group": user.gid, "extra_groups": []}
    if _reaches([], plain, program, data):
        return [], plain
    for capability in _CAPABILITIES:
        if _reaches(prefix := _with_capability(user, capability), {}, program, data):
            if data.parent.stat().st_uid == 0:
                # Nobody else who is the same user may steer a server that can do more than they can.
                data.parent.chmod(0o700)
            return prefix, {}
    raise EmbeddedError(
        f"for root, PostgreSQL runs as {_name(user.uid)}, who cannot reach {program} and {data}: "
        "open the directories above them, run as another user, allow this container DAC_READ_SEARCH, "
        "or set DATABASE_URL"
    )


def _reaches(prefix: list[str], identity: dict[str, Any], program: Path, data: Path) -> bool:
    probe = [*prefix, "/bin/sh", "-c", 'test -x "$0" && test -w "$1"', str(program), str(data)]
    try:
        return subprocess.run(probe, env=_environment(), capture_output=True, **identity).returncode == 0
    except (OSError, subprocess.SubprocessError):  # there is no setpriv, or we may not become another user
        return False


def _with_capability(user: User, capability: str) -> list[str]:
    return [
        *("setpriv", f"--reuid={user.uid}", f"--regid={user.gid}", "--clear-groups"),
        *(f"--inh-caps=+{capability}", f"--ambient-caps=+{capability}"),
        "--securebits=+no_setuid_fixup",  # else access(2), with which initdb looks for postgres, ignores it
        "--",
    ]


def _environment() -> dict[str, str]:
    """For the server's processes: others may be able to read their environment, and PGPORT and its like would
    change the server's ways."""
    return {"LC_ALL": "C", **{name: os.environ[name] for name in _ENVIRONMENT if name in os.environ}}
