"""The command line of this process in the list of processes, without its passwords.

Invariant: after `hide_passwords` has returned true, neither this process nor its forks show a password there. The
environment stays as it is: only the same user can read it.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from pgtask._dsn import names_database, redact

__all__ = ["hide_passwords"]

_ARG_START, _ARG_END = 48 - 3, 49 - 3  # fields of /proc/PID/stat, counted from the one behind the name


def hide_passwords() -> bool:
    """Overwrite the passwords in the arguments of this process, which `ps` reads. False where that is impossible:
    without Linux, or without /proc."""
    try:
        fields = Path("/proc/self/stat").read_bytes().rpartition(b")")[2].split()
        start, end = int(fields[_ARG_START]), int(fields[_ARG_END])
        with open("/proc/self/mem", "r+b", buffering=0) as memory:
            memory.seek(start)
            area = memory.read(end - start)
            if (shown := _without_passwords(area)) != area:
                memory.seek(start)
                memory.write(shown)
    except (OSError, ValueError, IndexError):
        return False
    return sys.platform == "linux"


def _without_passwords(area: bytes) -> bytes:
    """Return the arguments, each as long as before: the kernel finds them by their places."""
    words = area.split(b"\0")
    names = [b"", *words]  # the word before each word
    return b"\0".join(_without_password(word, before) for before, word in zip(names, words, strict=False))


def _without_password(word: bytes, before: bytes) -> bytes:
    flag, mark, value = word.partition(b"=") if word.startswith(b"-") else (b"", b"", word)
    text = os.fsdecode(value)
    if b"--dsn" not in (flag, before) and not names_database(text):
        return word
    if (shown := redact(text)) == text:
        return word
    new = os.fsencode(shown)
    return flag + mark + (new.ljust(len(value)) if len(new) <= len(value) else b"*" * len(value))
