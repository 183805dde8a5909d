"""`pgtask completion`: what each shell offers when a person presses Tab."""

from __future__ import annotations

import shlex
import shutil
import subprocess
from pathlib import Path

import pytest
from fix_commands import Command

from pgtask._cli.completion import SHELLS
from pgtask._cli.main import COMMANDS, build_parser
from pgtask._settings import SETTINGS

# Bash calls the function that `complete -p` names, with the words of the line, split as bash splits them.
PRESS_TAB = """
source "$1"; shift
registered=$(complete -p "$1") || exit 3
[[ $registered =~ -F\\ ([^ ]+) ]] || exit 4
COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1)); COMP_LINE="$*"; COMP_POINT=${#COMP_LINE}
"${BASH_REMATCH[1]}" "$1" "${COMP_WORDS[COMP_CWORD]}" "${COMP_WORDS[COMP_CWORD-1]}"
printf '%s\\n' "${COMPREPLY[@]}"
"""


@pytest.fixture
def script(command: Command, tmp_path: Path) -> Path:
    said = command("completion", "bash")
    assert (said.code, said.err) == (0, "")
    path = tmp_path / "completion"
    path.write_text(said.out)
    return path


def offered(script: Path, *words: str) -> list[str]:
    """What bash offers for the last of the words."""
    shell = ["bash", "--norc", "-u", "-c", PRESS_TAB, "bash", str(script), *words]
    done = subprocess.run(shell, capture_output=True, text=True, timeout=30, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout.split()


bash = pytest.mark.skipif(shutil.which("bash") is None, reason="there is no bash")


@bash
@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("pgtask lis", ["list"]),
        ("pgtask re", ["retry", "resume", "reschedule"]),
        ("pgtask --d", ["--dsn"]),
        ("pgtask --dsn x lis", ["list"]),
        ("pgtask --dsn = postgresql://h/x lis", ["list"]),
        ("pgtask --dsn postgresql://h/x list --js", ["--json"]),
        ("pgtask list --st", ["--state", "--step"]),
        ("pgtask list --state ", ["leased", "ready", "scheduled", "parked"]),
        ("pgtask list --state p", ["parked"]),
        ("pgtask list --state =", ["leased", "ready", "scheduled", "parked"]),
        ("pgtask list --state = p", ["parked"]),
        ("pgtask list --json --state l", ["leased"]),
        ("pgtask list --queue ", []),
        ("pgtask list -q l", []),
        ("pgtask completion ", ["bash", "zsh", "fish"]),
        ("pgtask completion f", ["fish"]),
        ("pgtask completion -", ["-h", "--help"]),
        ("pgtask runs --state E", ["ERROR"]),
        ("pgtask nonsense ", []),
        ("pgtask-supervisor --bur", ["--burst", "--burst-horizon"]),
        ("pgtask-supervisor greetings:app --log ", ["text", "json"]),
        ("pgtask-supervisor --procs 4 --log-level = w", ["warning"]),
        ("pgtask-supervisor --unknown p", ["put-back", "park"]),
        ("pgtask-supervisor -q ", []),
    ],
)
def test_bash_offers_what_the_parsers_take(script: Path, line: str, expected: list[str]) -> None:
    assert sorted(offered(script, *line.split(" "))) == sorted(expected)


@bash
def test_bash_offers_all_commands_and_flags(script: Path) -> None:
    assert set(offered(script, "pgtask", "")) == set(COMMANDS)
    parser = build_parser()
    (commands,) = (action for action in parser._actions if action.dest == "command")
    for name, one in dict(commands.choices or {}).items():
        assert set(offered(script, "pgtask", name, "-")) == set(one._option_string_actions)
    flags = set(offered(script, "pgtask-supervisor", "-"))
    assert {setting.flag for setting in SETTINGS if setting.name != "app"} <= flags


@pytest.mark.parametrize("shell", SHELLS)
def test_each_script_is_one_that_its_shell_reads(command: Command, shell: str, tmp_path: Path) -> None:
    text = command("completion", shell).out
    for name in COMMANDS:
        assert name in text
    for word in ("parked", "put-back", "keep-pg-task", "pgtask-supervisor"):
        assert word in text
    if shell == "fish":
        # Fish quotes as a POSIX shell does, but for a backslash before a quote.
        for line in text.replace("\\'", "").splitlines()[1:]:
            assert shlex.split(line)[:2] == ["complete", "-c"]
    else:
        assert shlex.split(text, comments=True)
    if (program := shutil.which(shell)) is not None:
        (tmp_path / "script").write_text(text)
        done = subprocess.run([program, "-n", str(tmp_path / "script")], capture_output=True, text=True, timeout=30)
        assert (done.returncode, done.stderr) == (0, "")


def test_completion_names_the_shells_and_reads_no_database(command: Command) -> None:
    said = command("completion", "tcsh")
    assert (said.code, said.out) == (2, "")
    for shell in SHELLS:
        assert shell in said.err
    assert command("--dsn", "postgresql://h/x", "completion", "bash").err == (
        "pgtask: pgtask completion reads no database: leave out --dsn\n"
    )
