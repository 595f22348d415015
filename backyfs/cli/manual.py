"""What manual pages say beyond the help texts: examples, and the exit codes of each command."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

EXIT_CODES: Mapping[int, str] = {
    0: "done",
    1: "failed",
    2: "wrong usage, or something that would lose data was not confirmed",
    10: "no repository there, or one this program cannot use",
    11: "no such revision or disk",
    12: "damaged data, or a new revision that differs from its source",
    13: "the source cannot be read",
    14: "no space left",
    75: "busy: another process is writing to the repository; try again or give --wait",
    129: "stopped by SIGHUP (the terminal or the connection was closed)",
    130: "stopped by SIGINT (Ctrl-C)",
    141: "the reader of stdout went away",
    143: "stopped by SIGTERM",
}

_ALWAYS = (0, 1, 2, 129, 130, 141, 143)
_VM = (10,)
_REVISION = (10, 11)
_EXITS: Mapping[str, Sequence[int]] = {
    "init": (10, 13, 14, 75),
    "backup": (10, 12, 13, 14, 75),
    "thaw": (10, 13, 75),
    "status": _VM,
    "find": _REVISION,
    "restore": (10, 11, 12, 14),
    "export-diff": (10, 11, 12, 14),
    "verify": (10, 11, 12),
    "scrub": (10, 12),
    "copy": (10, 12, 14, 75),
    "distrust": _REVISION,
    "forget": (10, 11, 75),
    "expire": (10, 12, 75),
    "gc": (10, 12, 14, 75),
    "purge": (10, 12, 14, 75),
    "tags": _REVISION,
    "mount": _VM,
    "loop": (10, 11, 12, 75),
    "nbd-server": _VM,
    "usage": _VM,
    "scheduler": (75,),
}

CHECK_CODES: Mapping[int, str] = {
    0: "OK",
    1: "WARNING",
    2: "CRITICAL",
    3: "UNKNOWN: the check itself failed, or was called wrongly",
}

EXAMPLES: Mapping[str, Sequence[tuple[str, str]]] = {
    "": (
        (
            "Make a repository and back up an image file:",
            "backyfs -b /srv/backy/web01 init file /var/lib/vms/web01.img",
        ),
        ("", "backyfs -b /srv/backy/web01 backup manual:first"),
        ("See what there is, and get the disk back:", "backyfs -b /srv/backy/web01 status"),
        ("", "backyfs -b /srv/backy/web01 restore -r latest /var/lib/vms/web01.img"),
    ),
    "init": (
        ("One disk, from a block device:", "backyfs -b /srv/backy/web01 init file /dev/vg0/web01"),
        (
            "Several disks:",
            "backyfs -b /srv/backy/db01 init file root=/dev/vg0/db01 data=/dev/vg0/db01-data",
        ),
        (
            "An RBD image whose snapshots the hypervisor takes:",
            "backyfs -b /srv/backy/web01 init flyingcircus rbd/web01.root",
        ),
    ),
    "backup": (
        ("What is due by the schedule:", "backyfs -b /srv/backy/web01 backup"),
        (
            "A revision that never expires:",
            "backyfs -b /srv/backy/web01 backup manual:before-upgrade",
        ),
    ),
    "thaw": (("After the host lost power:", "backyfs -b /srv/backy/web01 thaw"),),
    "status": (
        ("One VM:", "backyfs -b /srv/backy/web01 status"),
        ("All VMs, for a script:", "backyfs -b /srv/backy status --json"),
    ),
    "find": (
        (
            "Where the last revision of a day lies:",
            "backyfs -b /srv/backy/web01 find -r 2026-11-14",
        ),
    ),
    "restore": (
        ("To a new file:", "backyfs -b /srv/backy/web01 restore -r latest /var/lib/vms/web01.img"),
        ("Into a Ceph image:", "backyfs -b /srv/backy/web01 restore -r 2026-11-14 rbd:pool/web01"),
        (
            "Write only what differs from what is there:",
            "backyfs -b /srv/backy/web01 restore --delta rbd:pool/web01",
        ),
    ),
    "export-diff": (
        (
            "Bring a Ceph image from the revision before to the newest:",
            "backyfs -b /srv/backy/web01 export-diff 1 0 | rbd import-diff - pool/web01",
        ),
    ),
    "verify": (
        ("The newest weekly revision:", "backyfs -b /srv/backy/web01 verify -r 'last(tag:weekly)'"),
    ),
    "scrub": (("Ten minutes of it:", "backyfs -b /srv/backy/web01 scrub --budget 600"),),
    "copy": (
        (
            "A second copy, in the other format:",
            "backyfs copy --store packs /srv/backy/web01 /mnt/usb/web01",
        ),
    ),
    "distrust": (
        (
            "What was made while the source was broken:",
            "backyfs -b /srv/backy/web01 distrust -r 2026-11-01..2026-11-03 --why 'bad RAM'",
        ),
    ),
    "forget": (
        ("See first what would go:", "backyfs -b /srv/backy/web01 forget -n -r ..2025-12-31"),
    ),
    "expire": (("Say why, change nothing:", "backyfs -b /srv/backy/web01 expire -n"),),
    "gc": (("What would be freed:", "backyfs -b /srv/backy/web01 gc -n"),),
    "purge": (
        ("All VMs, one after the other:", "for vm in /srv/backy/*/; do backyfs -b $vm purge; done"),
    ),
    "tags": (
        (
            "Keep the newest revision for good:",
            "backyfs -b /srv/backy/web01 tags add -r latest manual:audit",
        ),
    ),
    "mount": (
        ("All revisions of all VMs:", "backyfs -b /srv/backy mount /mnt/backy"),
        (
            "A file out of a guest:",
            "mount -o ro,loop,offset=1048576 /mnt/backy/web01/latest/disk.img /mnt/guest",
        ),
    ),
    "umount": (("End it:", "backyfs umount /mnt/backy"),),
    "nbd-server": (
        ("All VMs of this host, to this host:", "backyfs -b /srv/backy nbd-server"),
        ("Then, as a block device:", "nbd-client -N web01/latest 127.0.0.1 9000 /dev/nbd0"),
    ),
    "loop": (
        ("Yesterday's files of a guest:", "backyfs -b /srv/backy/web01 loop yesterday /mnt/guest"),
    ),
    "unloop": (("End it:", "backyfs unloop /mnt/guest"),),
    "scheduler": (
        ("In the foreground:", "backyfs -l /var/log/backy.log scheduler -c /etc/backy.conf"),
    ),
    "jobs": (("All jobs of web servers:", "backyfs jobs 'web*'"),),
    "simulate": (("What `hourly` keeps:", "backyfs simulate hourly"),),
    "check-config": (
        (
            "Before a reload:",
            "backyfs check-config -c /etc/backy.conf && systemctl reload backyfs-scheduler",
        ),
    ),
    "check": (
        ("As Nagios calls it:", "backyfs check"),
        (
            "For node_exporter, every five minutes:",
            "backyfs check --metrics /var/lib/prometheus/node-exporter/backyfs.prom",
        ),
    ),
    "usage": (
        (
            "A bill for the last month:",
            "backyfs -b /srv/backy usage --since last-month --until this-month --csv",
        ),
        ("Which revision takes the space:", "backyfs -b /srv/backy/web01 usage --exclusive"),
    ),
    "doctor": (("Before the first backup:", "backyfs doctor"),),
    "completion": (("For this shell:", 'eval "$(backyfs completion bash)"'),),
    "help": (("A topic:", "backyfs help spec"),),
}


def exit_codes(command: str) -> Mapping[int, str]:
    """The codes a command ("" = all of them) may exit with, and what they mean."""
    if command == "check":
        return CHECK_CODES
    wanted = sorted({*_ALWAYS, *_EXITS.get(command, ())}) if command else EXIT_CODES
    return {code: EXIT_CODES[code] for code in wanted}


def exit_table() -> str:
    """All codes, one a line."""
    return "\n".join(f"{code:3}  {text}" for code, text in EXIT_CODES.items())
