"""The one command-line grammar: a frozen dataclass is the interface, `key=value` words set it.

Every entry point is `def main(config)`, run as `main(parse(EvalConfig))`.
"""

import difflib
import re
import sys
from collections.abc import Callable, Sequence
from typing import Any

import tyro

WORD = re.compile(r"[A-Za-z_][\w.-]*=")
CONF = (tyro.conf.FlagConversionOff, tyro.conf.AvoidSubcommands)


def to_options(words: Sequence[str]) -> list[str]:
    """Turns `key=value` words into `--key=value`, split at the first `=`.

    Words that already start with `-`, the value that follows a bare `--key`, and words without `=`
    (subcommands) pass through.
    """
    options: list[str] = []
    value_expected = False
    for word in words:
        rewrite = not value_expected and WORD.match(word)
        options.append(f"--{word}" if rewrite else word)
        value_expected = word.startswith("--") and "=" not in word
    return options


def parse[T](
    config: type[T],
    words: Sequence[str] | None = None,
    prog: str | None = None,
    default: T | None = None,
) -> T:
    """Parses `words` (default: the process's arguments) into an instance of the dataclass `config`.

    `default` supplies other defaults than the class. Exits with status 2 and the nearest names
    where a word is misspelt, and with status 0 after `--help`, which lists every field with its
    default.
    """
    options = to_options(sys.argv[1:] if words is None else words)
    try:
        if default is None:
            return tyro.cli(config, args=options, prog=prog, config=CONF)
        return tyro.cli(config, args=options, prog=prog, config=CONF, default=default)
    except ValueError as error:  # a rule between fields, raised by the dataclass itself
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None


def dispatch(
    commands: dict[str, Callable[[Sequence[str]], Any]],
    words: Sequence[str] | None = None,
    prog: str = "",
) -> Any:
    """Runs the subcommand that the leading word names, with the remaining words.

    `--help` lists the subcommands; a missing or unknown one exits with status 2 and the nearest
    names.
    """
    words = sys.argv[1:] if words is None else words
    usage = f"usage: {prog} {{{','.join(commands)}}} [key=value ...]"
    name = words[0] if words else ""
    if name in ("-h", "--help"):
        print(f"{usage}\n\n{prog} COMMAND --help lists the settings of a command.")
        raise SystemExit(0)
    if name not in commands:
        near = difflib.get_close_matches(name, commands)
        hint = f"; did you mean {' or '.join(near)}?" if near else ""
        print(f"{usage}\nerror: unknown command {name!r}{hint}", file=sys.stderr)
        raise SystemExit(2)
    return commands[name](words[1:])
