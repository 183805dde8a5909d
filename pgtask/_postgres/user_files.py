"""Files in a directory of the server's user that this process, which may be root, reads and writes.

Invariant: root follows no name in such a directory. The user may put a link, a second name of a file or a pipe there,
to make root overwrite, read or wait for something else. This module opens only plain files with one name, of that user
or of ours, and new files.
"""

from __future__ import annotations

import errno
import os
import stat
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from pgtask._postgres.server_user import User, name_of
from pgtask.errors import EmbeddedError

__all__ = ["Folder", "create_file", "open_folder"]

if sys.platform != "win32":  # Windows imports this module, and does not use it
    _NEW = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    _EXISTING = os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC  # a pipe must not make us wait


@contextmanager
def open_folder(path: Path, user: User) -> Iterator[Folder]:
    """Open a directory of the user. Raises `EmbeddedError` if it belongs to another user, and `OSError`."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        if os.fstat(descriptor).st_uid != user.uid:
            raise EmbeddedError(f"{path} does not belong to {name_of(user.uid)}: move it away")
        yield Folder(path, user, descriptor)
    finally:
        os.close(descriptor)


class Folder:
    """A directory of the server's user. Every method takes the name of a file in it, never a path."""

    def __init__(self, path: Path, user: User, descriptor: int) -> None:
        self._path = path
        self._user = user
        self._descriptor = descriptor

    def read(self, name: str, start: int = 0) -> bytes:
        """Return the content of the file from `start` on."""
        with os.fdopen(self._open(name, os.O_RDONLY), "rb") as stream:
            stream.seek(start)
            return stream.read()

    def size(self, name: str) -> int:
        return os.stat(name, dir_fd=self._descriptor, follow_symlinks=False).st_size

    def names(self) -> list[str]:
        return sorted(os.listdir(self._descriptor))

    def append(self, name: str, text: str) -> None:
        """Append to a file, which must exist."""
        with os.fdopen(self._open(name, os.O_WRONLY | os.O_APPEND), "w", encoding="utf-8") as stream:
            stream.write(text)

    def replace(self, name: str, text: str) -> None:
        """Replace anything of that name by a new file."""
        fresh = f"{name}.new"
        self.remove(fresh)
        with os.fdopen(os.open(fresh, _NEW, 0o600, dir_fd=self._descriptor), "w", encoding="utf-8") as stream:
            if os.geteuid() == 0:
                os.fchown(stream.fileno(), self._user.uid, self._user.gid)
            stream.write(text)
        os.replace(fresh, name, src_dir_fd=self._descriptor, dst_dir_fd=self._descriptor)

    def remove(self, name: str) -> None:
        with suppress(FileNotFoundError):
            os.unlink(name, dir_fd=self._descriptor)

    def _open(self, name: str, flags: int) -> int:
        path = self._path / name
        try:
            descriptor = os.open(name, flags | _EXISTING, dir_fd=self._descriptor)
        except OSError as error:
            if error.errno in (errno.ELOOP, errno.ENXIO):
                raise EmbeddedError(f"{path} is not a plain file: remove it") from error
            raise OSError(error.errno, error.strerror, str(path)) from error
        status = os.fstat(descriptor)
        is_known = status.st_uid in (self._user.uid, os.geteuid()) and status.st_nlink == 1
        if stat.S_ISREG(status.st_mode) and is_known:
            return descriptor
        os.close(descriptor)
        raise EmbeddedError(f"{path} is not a plain file of {name_of(self._user.uid)} with one name: remove it")


def create_file(path: Path, text: str) -> None:
    """Write a new file; an existing file or link of that name stays as it is."""
    try:
        descriptor = os.open(path, _NEW, 0o644)
    except FileExistsError:
        return
    with os.fdopen(descriptor, "w", encoding="utf-8") as stream:
        stream.write(text)
