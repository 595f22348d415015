"""backyfs completion: the completion script for a shell."""

from __future__ import annotations

import click

from backyfs.cli import output


@click.command()
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
def command(shell: str) -> None:
    """Print the completion script for SHELL. In bash:

    \b
        backyfs completion bash > /usr/share/bash-completion/completions/backyfs

    or, for the current shell: eval "$(backyfs completion bash)".
    """  # noqa: D301 - click takes a backspace for: leave these lines alone
    from click.shell_completion import get_completion_class

    from backyfs.cli.main import program

    found = get_completion_class(shell)
    assert found is not None  # the choices are those click has
    output.line(found(program, {}, "backyfs", "_BACKYFS_COMPLETE").source())
