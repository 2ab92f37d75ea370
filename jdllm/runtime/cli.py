"""The one command-line grammar: a frozen dataclass is the interface, `key=value` words set it.

Every entry point is `def main(config)`, run as `main(parse(EvalConfig))`. A dataclass with a class
attribute `presets` (name -> settings) also has the word `preset=NAME`: its settings, by dotted
names, stand for those that are not given. A field `preset`, if it has one, keeps the name. A class
attribute `renamed` (old name -> dotted name) tells what a setting is called now.
"""

import contextlib
import dataclasses
import io
import os
import re
import shlex
import sys
import typing
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, get_args, get_origin

import tyro

from jdllm.runtime import signals
from jdllm.runtime.fields import NUMBERS, nested, preset_tables, refused_presets
from jdllm.runtime.hints import asked, nearest
from jdllm.runtime.mistakes import (
    TRUTH,
    as_typed,
    check_given,
    check_names,
    check_values,
    listed,
    refuse,
    setting_of,
    unboxed,
)

WORD = re.compile(r"[A-Za-z_][\w.-]*=")
HELP_ALL = {"--help-all", "--help_all"}
HELP = {"-h", "--help", *HELP_ALL}
CONF = (tyro.conf.FlagConversionOff, tyro.conf.AvoidSubcommands)
REGISTRY = tyro.constructors.ConstructorRegistry()


@REGISTRY.primitive_rule
def _truth(info: tyro.constructors.PrimitiveTypeInfo) -> Any:
    """Booleans in any of the usual spellings; tyro itself takes only True and False."""
    if info.type is not bool:
        return None
    return tyro.constructors.PrimitiveConstructorSpec(
        nargs=1,
        metavar="{true,false}",
        instance_from_str=lambda words: _read_truth(words[0]),
        is_instance=lambda value: isinstance(value, bool),
        str_from_instance=lambda value: [str(value).lower()],
    )


def _read_truth(word: str) -> bool:
    if word.lower() not in TRUTH:
        raise ValueError(f"expected true or false, got {word}")
    return TRUTH[word.lower()]


@REGISTRY.primitive_rule
def _numbers(info: tyro.constructors.PrimitiveTypeInfo) -> Any:
    """Tuples of numbers, as one word with commas. Where a default has some, tyro gives the type in
    typing's older spelling."""
    if get_origin(info.type) is not tuple or tuple[get_args(info.type)] not in NUMBERS:
        return None
    kind = NUMBERS[tuple[get_args(info.type)]]
    name = kind.__name__.upper()
    return tyro.constructors.PrimitiveConstructorSpec(
        nargs=1,
        metavar=f"{name},{name},...",
        instance_from_str=lambda words: tuple(kind(word) for word in words[0].split(",") if word),
        is_instance=lambda value: isinstance(value, tuple),
        str_from_instance=lambda value: [",".join(map(str, value))],
    )


@REGISTRY.primitive_rule
def _path(info: tyro.constructors.PrimitiveTypeInfo) -> Any:
    """Paths, of which `~` is the home folder: no shell expands it behind a `key=`."""
    if info.type is not Path:
        return None
    return tyro.constructors.PrimitiveConstructorSpec(
        nargs=1,
        metavar="PATH",
        instance_from_str=lambda words: Path(os.path.expanduser(words[0])),
        is_instance=lambda value: isinstance(value, Path),
        str_from_instance=lambda value: [str(value)],
    )


def expand_presets(config: type, options: Sequence[str], prog: str) -> list[str]:
    """Turns `--x.preset=NAME` into that preset's settings, but for those that are given as well.

    Exits with status 2 and the nearest names, or the reason, where there is no such preset.
    """
    tables = preset_tables(config)
    fields = [p + field.name for p, kind in nested(config) for field in dataclasses.fields(kind)]
    given = {setting_of(option) for option in options}
    chosen: dict[str, str] = {}
    kept = []
    words = iter(options)
    for word in words:
        if (setting := setting_of(word)) in tables:
            chosen[setting] = word.partition("=")[2] if "=" in word else next(words, "")
        else:
            kept.append(word)
    for setting, name in sorted(chosen.items(), key=lambda item: -item[0].count(".")):
        if reason := refused_presets(config)[setting].get(name):
            refuse(f"{prog} has no {setting}={name}: {reason}")
        if name not in tables[setting]:
            hint = asked(nearest(name, tables[setting])) or listed(tables[setting])
            refuse(f"{prog} knows no {setting}={name}; {hint}")
        prefix = setting.removesuffix("preset")
        table = {prefix + key: value for key, value in tables[setting][name].items()}
        kept += [f"--{key}={as_word(value)}" for key, value in table.items() if key not in given]
        kept += [f"--{setting}={name}"] if setting in fields else []
        given |= set(table)  # decode.preset=NAME counts more than preset=NAME
    return kept


def as_word(value: Any) -> Any:
    """Returns several numbers as one word, anything else as it is."""
    several = isinstance(value, tuple) and not any(isinstance(each, str) for each in value)
    return ",".join(map(str, value)) if several else value


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
    where a word is misspelt, and with status 0 after `--help` or `--help-all` (see
    `jdllm.runtime.help`).
    """
    options = to_options(sys.argv[1:] if words is None else words)
    if asked := HELP & set(options):
        from jdllm.runtime.help import page  # which stands on this file

        print(page(config, prog or "this command", default, full=bool(asked & HELP_ALL)))
        raise SystemExit(0)
    name = prog or "this command"
    options = expand_presets(config, options, name)
    check_names(config, options, name)
    check_values(config, options, name)
    if default is None:
        check_given(config, options, name)
    shared: Any = {
        "args": options,
        "prog": prog,
        "config": CONF,
        "registry": REGISTRY,
        "use_underscores": True,  # as the settings are written everywhere else
    }
    if default is not None:
        shared["default"] = default
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            return tyro.cli(config, **shared)
    except SystemExit:
        print(unboxed(said.getvalue()), end="", file=sys.stderr)
        raise


def command(settings: Any, module: str) -> str:
    """The command line that gives these settings: what is not the default, as words."""
    words = []
    for name, value in _changed(settings):
        value = as_word(value)
        several = isinstance(value, tuple)
        text = " ".join(shlex.quote(str(each)) for each in (value if several else (value,)))
        words.append(f"--{name} {text}" if several else f"{name}={text}")
    return " ".join([f"python -m {module}", *words])


def _changed(settings: Any) -> Iterator[tuple[str, Any]]:
    """Dotted names and values of the settings that are not the defaults."""
    for field in dataclasses.fields(settings):
        value = getattr(settings, field.name)
        if dataclasses.is_dataclass(value):
            yield from ((f"{field.name}.{name}", inner) for name, inner in _changed(value))
        elif value != field.default:
            yield field.name, value


def run[T](main: Callable[[T], Any], config: type[T], prog: str) -> None:
    """An entry point: parses the process's arguments and runs `main`.

    What `one_sentence` says ends it in one sentence. A config's `going_on`, where it has such a
    property, tells how to go on after an interrupt; `python -X dev` shows where errors came from.
    """
    try:
        with one_sentence():
            settings = parse(config, prog=as_typed(prog))
            with one_sentence(getattr(settings, "going_on", "")):
                main(settings)
    except BaseException as error:
        if processes := sys.modules.get("jdllm.runtime.processes"):  # --help did not wait for JAX
            processes.fail(error)
        raise


@contextlib.contextmanager
def one_sentence(going_on: str = "") -> Iterator[None]:
    """Ends the process in one sentence for what a user asked for or did.

    ValueError, OSError and a JAX_PLATFORMS that this machine does not serve: status 1. Ctrl-C and
    SIGTERM: 130 and 143, with how to go on. Output that nobody reads any more: 141.
    """
    try:
        with signals.raised():
            yield
        sys.stdout.flush()
    except BrokenPipeError:
        _end("error: what was to read the output has closed it", 141)
    except (ValueError, OSError) as error:
        if sys.flags.dev_mode:
            raise
        _end(f"error: {_told(error)}", 1)
    except KeyboardInterrupt as error:
        newline = "\n" * sys.stderr.isatty()  # behind the terminal's own ^C
        _end(f"{newline}interrupted{going_on and f': {going_on}'}", signals.status(error))
    except (RuntimeError, AssertionError):
        if not (platforms := _missing_platforms()):
            raise
        _end(
            f"error: JAX_PLATFORMS={platforms} names devices that JAX cannot use here; unset it, "
            "or let python -m jdllm.doctor say why",
            1,
        )


def _told(error: Exception) -> str:
    """An error as it is shown: of one that the system raised, its reason and the file."""
    if isinstance(error, OSError) and error.filename is not None and error.strerror:
        return f"{error.filename}: {error.strerror}"
    return str(error)


def _missing_platforms() -> str:
    """JAX_PLATFORMS, where it keeps JAX from finding any device; else ""."""
    platforms = os.environ.get("JAX_PLATFORMS", "")
    if not platforms or not (jax := sys.modules.get("jax")):
        return ""
    try:
        jax.devices()
    except (RuntimeError, AssertionError):
        return platforms
    return ""


def _end(sentence: str, status: int) -> typing.NoReturn:
    """Says why the process ends and ends it; what cannot be written any more is dropped."""
    for stream, text in ((sys.stdout, ""), (sys.stderr, as_typed(sentence) + "\n")):
        try:
            stream.write(text)
            stream.flush()
        except (OSError, ValueError):
            with contextlib.suppress(OSError, ValueError), open(os.devnull, "w") as nowhere:
                os.dup2(nowhere.fileno(), stream.fileno())  # Python flushes again at its end
    raise SystemExit(status) from None


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
    prog = as_typed(prog)
    usage = f"usage: {prog} {{{','.join(commands)}}} [key=value ...]"
    name = words[0] if words else ""
    if name in ("-h", "--help"):
        from jdllm.runtime.help import examples  # which stands on this file

        shown = [f"  {line}" for line in examples(prog, sys.modules["__main__"].__doc__)]
        end = f"{prog} COMMAND --help lists the settings of a command."
        print("\n".join([usage, "", *["examples", *shown, ""] * bool(shown), end]))
        raise SystemExit(0)
    if name not in commands:
        hint = (near := asked(nearest(name, commands))) and f"; {near}"
        print(f"{usage}\nerror: unknown command {name!r}{hint}", file=sys.stderr)
        raise SystemExit(2)
    return commands[name](words[1:])
