"""backyfs completion: the completion script for a shell."""

from __future__ import annotations

import click

from backyfs.cli import output

_BASH = r"""_backyfs_completion() {
    local IFS=$'\n' rest=$COMP_LINE last=${COMP_WORDS[COMP_CWORD]} word type value
    local -a words=()

    # Readline ends words at : and =, so that tag:daily is three: what no blank parts is one again.
    for word in "${COMP_WORDS[@]:0:COMP_CWORD+1}"; do
        if [[ -n $COMP_LINE && ${#words[@]} -gt 0 && $rest != [[:blank:]]* ]]; then
            words[-1]+=$word
        else
            words+=("$word")
            rest=${rest#"${rest%%[![:blank:]]*}"}
        fi
        rest=${rest#"$word"}
    done
    # It replaces the last piece only.
    [[ $last =~ ^[:=]+$ ]] && last=
    local before=${words[-1]%"$last"}

    while IFS=',' read -r type value; do
        if [[ $type == dir ]]; then
            COMPREPLY=()
            compopt -o dirnames
        elif [[ $type == plain ]]; then
            COMPREPLY+=("${value#"$before"}")
        fi
    done < <(env COMP_WORDS="${words[*]}" COMP_CWORD=$((${#words[@]} - 1)) \
        _BACKYFS_COMPLETE=bash_complete "$1")
}

complete -o nosort -F _backyfs_completion backyfs
"""


@click.command()
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
def command(shell: str) -> None:
    """Print the completion script for SHELL. In bash:

    \b
        backyfs completion bash > /usr/share/bash-completion/completions/backyfs

    or, for the current shell: eval "$(backyfs completion bash)".
    """  # noqa: D301 - click takes a backspace for: leave these lines alone
    if shell == "bash":
        output.line(_BASH)
        return
    from click.shell_completion import get_completion_class

    from backyfs.cli.main import program

    found = get_completion_class(shell)
    assert found is not None  # the choices are those click has
    output.line(found(program, {}, "backyfs", "_BACKYFS_COMPLETE").source())
