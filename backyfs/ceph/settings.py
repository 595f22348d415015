"""How to reach a Ceph cluster: configuration file, client id, and how long to wait for anything.

What is not set comes from the environment, as with Ceph's own programs: CEPH_CONF, and the options
in CEPH_ARGS (`--id backyfs`, `--conf FILE`, `--cluster NAME`, `--keyring FILE`, ...).
"""

from __future__ import annotations

import os
import shlex
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from backyfs.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Settings:
    """A cluster and a client of it; "" is for each what Ceph takes by itself.

    `conf`: path of ceph.conf. `client`: the id without "client." ("admin" unless set). `cluster`:
    its name ("ceph"). The times bound, in seconds: `connect_s` finding a monitor, `monitor_s` one
    request to it, `osd_s` one request to the storage daemons. A request to a hung daemon ends
    then, with an error.
    """

    conf: str = ""
    client: str = ""
    cluster: str = ""
    connect_s: int = 15
    monitor_s: int = 60
    osd_s: int = 120

    def timeouts(self) -> dict[str, str]:
        """Ceph's options for the times: by default, and with 0, it waits for ever."""
        return {
            "client_mount_timeout": str(self.connect_s),
            "rados_mon_op_timeout": str(self.monitor_s),
            "rados_osd_op_timeout": str(self.osd_s),
        }


def completed(settings: Settings, environment: Mapping[str, str] = os.environ) -> Settings:
    """`settings` with what is not set taken from the environment; ConfigError if that is wrong."""
    given = dict(_arguments(environment.get("CEPH_ARGS", "")))
    name = given.get("name", "").removeprefix("client.")
    return Settings(
        settings.conf or given.get("conf", "") or environment.get("CEPH_CONF", ""),
        settings.client or given.get("id", "") or name or "admin",
        settings.cluster or given.get("cluster", "") or "ceph",
        settings.connect_s,
        settings.monitor_s,
        settings.osd_s,
    )


_OPTIONS = {
    "--id": "id",
    "--user": "id",
    "-n": "name",
    "--name": "name",
    "-c": "conf",
    "--conf": "conf",
    "--cluster": "cluster",
}


def _arguments(text: str) -> Iterator[tuple[str, str]]:
    """The options of CEPH_ARGS that librados wants to know at once; it reads the others itself."""
    try:
        words = iter(shlex.split(text))
    except ValueError as exc:
        raise ConfigError(f"CEPH_ARGS in the environment: {exc}: {text!r}") from exc
    for word in words:
        option, sign, value = word.partition("=")
        if option in _OPTIONS:
            yield _OPTIONS[option], value if sign else next(words, "")
