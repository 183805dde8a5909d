"""The program `pgtask web`, and a client of its pages."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import httpx
from fix_commands import process
from paths import REPOSITORY


class Console(NamedTuple):
    address: str
    token: str
    client: httpx.Client

    def page(self, path: str, status: int = 200, **query: str) -> str:
        answer = self.client.get(path, params=query or None)
        assert answer.status_code == status, answer.text
        return answer.text


def serve(*words: str, app: str = "greeter:app") -> Iterator[Console]:
    """Run the program at a port that is free, until the generator goes on."""
    paths = {"PYTHONPATH": f"{REPOSITORY}:{REPOSITORY / 'tests/support'}"}
    program = process("web", app, "--port", "0", *words, environ=paths)
    assert program.stdout is not None
    try:
        address = program.stdout.readline().strip()
        token = program.stdout.readline().strip().removeprefix("token: ") if "--write" in words else ""
        assert address.startswith("http"), program.communicate()
        with httpx.Client(base_url=address, timeout=20) as client:
            yield Console(address, token, client)
    finally:
        program.terminate()
        _, errors = program.communicate(timeout=20)
    assert program.returncode == 0
    assert errors == ""
