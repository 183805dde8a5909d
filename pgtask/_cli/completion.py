"""Scripts that complete the words of a command line in bash, zsh and fish, made from the parsers of both programs.

Invariant: a script knows what the parsers know, and nothing else: it runs no program and reads no database when a
person presses Tab.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable, Iterator, Mapping, Sequence

import msgspec

__all__ = ["SHELLS", "Words", "describe_parser"]

_PLAIN = re.compile(r"[\w.+-]+")


class Flag(msgspec.Struct, frozen=True):
    """A flag with its spellings, and the choices for its value; None if it takes no value. It may `repeat`."""

    names: tuple[str, ...]
    summary: str
    choices: tuple[str, ...] | None = None
    repeats: bool = False


class Words(msgspec.Struct, frozen=True):
    """The words that follow a program or a command: its flags, the choices of its arguments, and its commands."""

    name: str
    summary: str
    flags: tuple[Flag, ...]
    choices: tuple[str, ...] = ()
    commands: tuple[Words, ...] = ()

    @property
    def first_words(self) -> tuple[str, ...]:
        """The words, other than flags, that a person can choose from."""
        return (*self.choices, *(command.name for command in self.commands))

    @property
    def flag_names(self) -> list[str]:
        return [name for flag in self.flags for name in flag.names]


def describe_parser(
    parser: argparse.ArgumentParser,
    name: str,
    *,
    summaries: Mapping[str, str] | None = None,
    choices: Mapping[str, Sequence[str]] | None = None,
) -> Words:
    """Return the words of a parser and of its commands, whose `summaries` are given; and the `choices` of those flags
    that the parser itself does not check."""
    flags: list[Flag] = []
    arguments: list[str] = []
    commands: list[Words] = []
    for action in parser._actions:
        found = tuple(map(str, action.choices or (choices or {}).get((action.option_strings or [""])[-1], ())))
        if isinstance(action, argparse._SubParsersAction):
            commands += [
                describe_parser(one, command, summaries={"": (summaries or {}).get(command, "")})
                for command, one in action.choices.items()
            ]
        elif action.option_strings:
            names = tuple(sorted(action.option_strings, key=len))
            value = None if action.nargs == 0 else found
            flags.append(Flag(names, _expand_help(parser, action), value, isinstance(action, argparse._AppendAction)))
        else:
            arguments += found
    unsafe = [word for word in arguments if not _PLAIN.fullmatch(word)]
    assert not unsafe, f"a shell would split {unsafe}"
    return Words(name, (summaries or {}).get("", ""), tuple(flags), tuple(arguments), tuple(commands))


def _expand_help(parser: argparse.ArgumentParser, action: argparse.Action) -> str:
    if action.help is None or action.help == argparse.SUPPRESS:
        return ""
    return parser._get_formatter()._expand_help(action)


# --- bash ---------------------------------------------------------------------------------------------------

_BASH = """\
# Completion of {names} in bash. To load it: source <(pgtask completion bash)
{functions}"""

_BASH_FUNCTION = """\
{function}() {{
    local cur=${{COMP_WORDS[COMP_CWORD]}} prev=${{COMP_WORDS[COMP_CWORD-1]}} command= at word
    # Bash has split --flag=value at the equals sign.
    if [[ $cur == "=" ]]; then
        cur=
    elif [[ $prev == "=" ]]; then
        prev=${{COMP_WORDS[COMP_CWORD-2]}}
    fi
    for ((at = 1; at < COMP_CWORD; at++)); do
        word=${{COMP_WORDS[at]}}
        case $word in
            {skipped}) [[ ${{COMP_WORDS[at+1]}} == "=" ]] && ((at++)); ((at++)) ;;
            -*) ;;
            *) command=$word; break ;;
        esac
    done
    COMPREPLY=()
    case "$command $prev" in
{values}
    esac
    case $command in
{commands}
    esac
}}
complete -F {function} {program}
"""


def _write_bash(programs: Sequence[Words]) -> str:
    names = " and ".join(program.name for program in programs)
    return _BASH.format(names=names, functions="\n".join(map(_bash_function, programs)))


def _bash_function(program: Words) -> str:
    has_commands = bool(program.commands)
    parts = [("", program), *((command.name, command) for command in program.commands)]
    values = list(_bash_values(parts, "*" if not has_commands else None))
    # A program without commands has one set of flags, wherever its argument stands.
    first = "*" if not has_commands else '""'
    commands = [_bash_words(name or first, words) for name, words in parts]
    return _BASH_FUNCTION.format(
        function="_" + program.name.replace("-", "_"),
        program=program.name,
        skipped="|".join(name for flag in program.flags if flag.choices is not None for name in flag.names),
        values="\n".join(values),
        commands="\n".join(commands),
    )


def _bash_values(parts: Sequence[tuple[str, Words]], every: str | None) -> Iterator[str]:
    """Yield a branch for each flag that takes a value: it offers the choices, or nothing."""
    for name, words in parts:
        for flag in words.flags:
            if flag.choices is not None:
                command = every or (f'"{name} ' if name else '" ')
                patterns = (f'*" {one}"' if every else f'{command}{one}"' for one in flag.names)
                offered = _bash_offer(flag.choices) + "; " if flag.choices else ""
                yield f"        {'|'.join(patterns)}) {offered}return ;;"


def _bash_words(pattern: str, words: Words) -> str:
    flags = _bash_offer(words.flag_names)
    if not words.first_words:
        return f"        {pattern}) {flags} ;;"
    return f"        {pattern}) if [[ $cur == -* ]]; then {flags}; else {_bash_offer(words.first_words)}; fi ;;"


def _bash_offer(words: Sequence[str]) -> str:
    return f'COMPREPLY=($(compgen -W "{" ".join(words)}" -- "$cur"))'


# --- zsh ----------------------------------------------------------------------------------------------------

_ZSH = """\
#compdef {names}
# Completion of {names} in zsh. To load it: source <(pgtask completion zsh)
{functions}
if [[ ${{zsh_eval_context[-1]}} == loadautofunc ]]; then
    "_${{service//-/_}}" "$@"
else
{registered}
fi
"""


def _write_zsh(programs: Sequence[Words]) -> str:
    return _ZSH.format(
        names=" ".join(program.name for program in programs),
        functions="\n".join(map(_zsh_function, programs)),
        registered="\n".join(f"    compdef _{one.name.replace('-', '_')} {one.name}" for one in programs),
    )


def _zsh_function(program: Words) -> str:
    lines = [
        f"_{program.name.replace('-', '_')}() {{",
        "    local curcontext=$curcontext context state state_descr line",
    ]
    lines.append("    typeset -A opt_args")
    if not program.commands:
        lines += [_zsh_arguments(program, "    "), "}"]
        return "\n".join(lines) + "\n"
    lines.append(_zsh_arguments(program, "    ", " \\\n        '1:command:->command' '*::argument:->argument'", "-C"))
    lines += ["    case $state in", "        command)", "            local -a commands", "            commands=("]
    lines += [f"                {_zsh_quote(f'{one.name}:{one.summary}')}" for one in program.commands]
    lines += ["            )", "            _describe command commands", "            ;;", "        argument)"]
    lines.append("            case $words[1] in")
    for one in program.commands:
        rest = (
            f" \\\n                    {_zsh_quote('*:argument:(' + ' '.join(one.choices) + ')')}"
            if one.choices
            else ""
        )
        lines += [f"                {one.name})", _zsh_arguments(one, " " * 20, rest), "                    ;;"]
    lines += ["            esac", "            ;;", "    esac", "}"]
    return "\n".join(lines) + "\n"


def _zsh_arguments(words: Words, indent: str, rest: str = "", options: str = "") -> str:
    specs = [_zsh_flag(flag) for flag in words.flags]
    start = f"{indent}_arguments{' ' + options if options else ''}"
    return " \\\n".join([start, *(f"{indent}    {spec}" for spec in specs)]) + rest


def _zsh_flag(flag: Flag) -> str:
    """Return the specification. The spellings of a flag that does not repeat exclude each other."""
    help = re.sub(r"([\[\]:\\])", r"\\\1", flag.summary)
    value = "" if flag.choices is None else ":value:" + (f"({' '.join(flag.choices)})" if flag.choices else " ")
    names = " ".join(flag.names)
    before = "*" if flag.repeats else f"({names})"
    if len(flag.names) == 1:
        return _zsh_quote(f"{'*' if flag.repeats else ''}{names}[{help}]{value}")
    return f"{_zsh_quote(before)}{{{','.join(flag.names)}}}{_zsh_quote(f'[{help}]{value}')}"


def _zsh_quote(text: str) -> str:
    return "'" + text.replace("'", "'\\''") + "'"


# --- fish ---------------------------------------------------------------------------------------------------


def _write_fish(programs: Sequence[Words]) -> str:
    names = " and ".join(program.name for program in programs)
    lines = [f"# Completion of {names} in fish. To load it: pgtask completion fish | source"]
    for program in programs:
        lines.append(f"complete -c {program.name} -f")
        start = f"complete -c {program.name}"
        every = f"{start} -n {_fish_quote('__fish_use_subcommand')}" if program.commands else start
        lines += [f"{every} {_fish_flag(flag)}" for flag in program.flags]
        for command in program.commands:
            lines.append(f"{every} -a {command.name} -d {_fish_quote(command.summary)}")
            within = f"{start} -n {_fish_quote(f'__fish_seen_subcommand_from {command.name}')}"
            lines += [f"{within} {_fish_flag(flag)}" for flag in command.flags]
            if command.choices:
                lines.append(f"{within} -a {_fish_quote(' '.join(command.choices))}")
    return "\n".join(lines) + "\n"


def _fish_flag(flag: Flag) -> str:
    names = " ".join(f"-l {one[2:]}" if one.startswith("--") else f"-s {one[1:]}" for one in flag.names)
    value = ""
    if flag.choices is not None:
        value = " -x" + (f" -a {_fish_quote(' '.join(flag.choices))}" if flag.choices else "")
    return f"{names}{value} -d {_fish_quote(flag.summary)}"


def _fish_quote(text: str) -> str:
    return "'" + text.replace("\\", "\\\\").replace("'", "\\'") + "'"


SHELLS: Mapping[str, Callable[[Sequence[Words]], str]] = {"bash": _write_bash, "zsh": _write_zsh, "fish": _write_fish}
"""The writers of the scripts, by the names of the shells."""
