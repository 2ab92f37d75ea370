"""Shell completion: a script that knows every command, its `key=value` words and their choices.

tyro's own scripts complete `--key VALUE`, which is not how settings are written here. A script is a
table of words and a function that walks it: nothing of this package runs while somebody types.
"""

from collections.abc import Iterator, Mapping

from jdllm.runtime.fields import preset_tables
from jdllm.runtime.help import settings_of

Row = tuple[str, str, str]
"""The command so far, a word that may follow, and the choices behind its `=`."""


def rows(name: str, commands: Mapping[str, type | None]) -> Iterator[Row]:
    """Yields what may follow `name` and each command, whose words are set in a dataclass.

    `commands` are words behind `name`, such as "eval" and "bench grid"; None has no settings.
    """
    yield name, "--help", ""
    for command, config in commands.items():
        *before, word = command.split()
        yield "/".join([name, *before]), word, ""
        path = "/".join([name, *before, word])
        yield path, "--help", ""
        if config is None:
            continue
        yield path, "--help-all", ""
        tables = preset_tables(config)
        for settings in settings_of(config).values():
            for one in settings:
                known = filter(None, tables[one.name]) if one.name in tables else ()
                choices = " ".join(known) or ("|" in one.values) * one.values.replace("|", " ")
                yield path, f"{one.name}=", choices


BASH = r"""# Completes {name} in bash; made by: {name} completion bash
_{name}_table='{table}'
_{name}() {{
    local typed=${{COMP_LINE:0:COMP_POINT}} path={name} words word current row_path row_word choices
    read -ra words <<< "$typed"
    current=
    [[ $typed == *[[:space:]] ]] || {{ current=${{words[-1]}}; unset 'words[-1]'; }}
    for word in "${{words[@]:1}}"; do
        [[ $_{name}_table == *$'\n'"$path $word "* && $word != --* ]] && path+=/$word
    done
    local prefix=  # what readline has already cut off, which it does behind each =
    [[ $current == *=* && $COMP_WORDBREAKS == *=* ]] && prefix=${{current%%=*}}=
    COMPREPLY=()
    while read -r row_path row_word choices; do
        [[ $row_path == "$path" ]] || continue
        if [[ $row_word == *= && $current == "$row_word"* ]]; then
            for word in $choices; do
                [[ $row_word$word == "$current"* ]] && COMPREPLY+=("${{row_word#"$prefix"}}$word")
            done
        elif [[ $row_word == "$current"* ]]; then
            COMPREPLY+=("$row_word")
        fi
    done <<< "$_{name}_table"
    [[ ${{#COMPREPLY[@]}} -gt 0 && ${{COMPREPLY[0]}} == *= ]] && compopt -o nospace 2> /dev/null
    return 0
}}
complete -o default -F _{name} {name}  # default: files, behind a = that has no choices
"""


ZSH = r"""#compdef {name}
# Completes {name} in zsh; made by: {name} completion zsh
_{name}_table='{table}'
_{name}() {{
    local row_path row_word choices word current=$words[CURRENT]
    local place={name}
    local -a whole open
    for word in "${{(@)words[2,CURRENT-1]}}"; do
        [[ $_{name}_table == *$'\n'"$place $word "* && $word != --* ]] && place+=/$word
    done
    while read -r row_path row_word choices; do
        [[ $row_path == $place ]] || continue
        if [[ $row_word == *= && $current == "$row_word"* ]]; then
            compset -P '*='
            if [[ -n $choices ]]; then compadd -- ${{=choices}}; else _files; fi
            return
        elif [[ $row_word == *= ]]; then
            open+=($row_word)
        else
            whole+=($row_word)
        fi
    done <<< "$_{name}_table"
    compadd -- $whole
    compadd -S '' -- $open  # a value follows at once
}}
(( $+functions[compdef] )) && compdef _{name} {name}
"""
SCRIPTS = {"bash": BASH, "zsh": ZSH}


def script(shell: str, name: str, commands: Mapping[str, type | None]) -> str:
    """Returns the script that completes `name` in `shell`; ValueError for shells without one."""
    if shell not in SCRIPTS:
        known = " and ".join(SCRIPTS)
        raise ValueError(f"there is no completion for {shell or 'no shell'}; there is for {known}")
    table = "\n" + "".join(" ".join(row) + "\n" for row in rows(name, commands))
    return SCRIPTS[shell].format(name=name, table=table)
