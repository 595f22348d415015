"""backyfs scheduler: back up all VMs in time."""

from __future__ import annotations

import click

from backyfs.cli import options
from backyfs.cli.session import Session

EPILOG = """\b
Signals:
  SIGTERM, SIGINT   end; running backups may finish within `stop-timeout`
  SIGHUP            read the configuration again

\b
Console: telnet 127.0.0.1 6023 (help lists its commands)."""


@click.command(epilog=EPILOG)
@options.config
@click.pass_obj
def command(session: Session) -> None:
    """Run all jobs of the configuration (-c) when they are due, until SIGTERM.

    Stays in the foreground, for a service manager. Each backup is a command of its own: `backyfs
    -b BASE/VM backup TAGS`. After a backup the VM is purged; verification and scrub run now and
    then. One scheduler per base directory: a second one exits 75.
    """
    from backyfs import log
    from backyfs.engine.scheduling.daemon import serve

    log.configure(verbose=session.verbose, quiet=session.quiet, logfile=session.logfile)
    try:
        serve(session.site)
    finally:
        log.shut_down()
