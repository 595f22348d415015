"""`backyfs nbd-server`: offer revisions as block devices."""

from __future__ import annotations

from pathlib import Path

import click

from backyfs.cli import options
from backyfs.cli.session import Session
from backyfs.errors import UsageError

MIB = 1024 * 1024

EPILOG = """\b
Examples:
  cd /srv/backy/web01; backyfs nbd-server
  nbd-client -N REVISION localhost 9000 /dev/nbd0
  nbdinfo --list nbd://localhost:9000
  qemu-img convert -O qcow2 nbd://localhost:9000/latest web01.qcow2

Exports are VM/REVISION[/DISK][/pN], in one VM's directory also REVISION[/DISK][/pN]; REVISION is an
id, latest, tag:NAME, a date … (backyfs help spec), and pN a partition. They are read-only. With
@rw behind its name an export is writable: what is written is seen by that connection alone, and
gone when it ends."""


@click.command(epilog=EPILOG)
@click.option("-H", "--host", metavar="HOST", help="Address to listen on (default: 127.0.0.1).")
@click.option(
    "-p",
    "--port",
    metavar="PORT",
    type=click.IntRange(0, 65535),
    help="TCP port (default: 9000; 0: any that is free).",
)
@click.option(
    "--socket",
    "path",
    metavar="PATH",
    type=options.PATH,
    help="Listen on a unix socket, not on TCP.",
)
@click.option(
    "--tls-cert",
    metavar="FILE",
    type=options.PATH,
    help="Speak TLS only, with this certificate (PEM).",
)
@click.option(
    "--tls-key", metavar="FILE", type=options.PATH, help="Private key of the certificate (PEM)."
)
@click.option(
    "--tls-ca",
    metavar="FILE",
    type=options.PATH,
    help="Let in only clients with a certificate of this authority (PEM).",
)
@click.option(
    "--max-connections",
    metavar="N",
    type=click.IntRange(1, 1024),
    default=64,
    show_default=True,
    help="Most clients at a time.",
)
@click.option(
    "--scratch",
    metavar="DIR[:SIZE]",
    type=options.SCRATCH,
    help="Where what is written to @rw exports is kept, and how much of it, all together"
    " (default: /var/tmp:16G).",
)
@click.option(
    "--cache",
    "cache_mib",
    metavar="MIB",
    type=click.IntRange(min=1),
    default=64,
    show_default=True,
    help="Memory for decoded data.",
)
@click.pass_obj
def command(
    session: Session,
    host: str | None,
    port: int | None,
    path: Path | None,
    tls_cert: Path | None,
    tls_key: Path | None,
    tls_ca: Path | None,
    max_connections: int,
    scratch: tuple[Path, int | None] | None,
    cache_mib: int,
) -> None:
    """Offer the revisions of all VMs below the backup directory as block devices (NBD).

    Stays in the foreground; SIGTERM or SIGINT (Ctrl-C) end it. Takes the sockets a service manager
    hands over (socket activation).
    """
    from backyfs import log
    from backyfs.nbd.listening import HOST, PORT, Endpoint
    from backyfs.nbd.server import Limits
    from backyfs.nbd.service import Options, ScratchPlace, serve
    from backyfs.nbd.tls import TlsFiles

    if path is not None and (host is not None or port is not None):
        raise UsageError("--socket listens on no TCP port", hint="leave out -H and -p")
    if (tls_cert is None) != (tls_key is None) or (tls_ca is not None and tls_cert is None):
        raise UsageError("TLS needs both --tls-cert and --tls-key")
    what = Options(
        base=session.directory,
        endpoint=Endpoint(HOST if host is None else host, PORT if port is None else port, path),
        tls=TlsFiles(tls_cert, tls_key, tls_ca) if tls_cert and tls_key else None,
        scratch=ScratchPlace(*scratch) if scratch else None,
        cache_bytes=cache_mib * MIB,
        limits=Limits(connections=max_connections),
    )
    log.configure(
        verbose=session.verbose, quiet=session.quiet, logfile=session.logfile, service=True
    )
    try:
        serve(what, lambda places: None)
    finally:
        log.shut_down()
