"""The keys of a source of type `flyingcircus`: those of `ceph-rbd`, and how to ask the hypervisor.

    {type: flyingcircus, pool: rbd, image: web01.root, vm: web01, consul-token-file: /etc/consul}

`vm` and `consul_acl_token` are Backy's.
"""

from __future__ import annotations

from collections.abc import Mapping
from difflib import get_close_matches
from typing import Any, NamedTuple

from backyfs.config.interval import parse_interval
from backyfs.config.quiesce import Policy
from backyfs.errors import ConfigError, UsageError
from backyfs.source.ceph import config as ceph
from backyfs.source.flyingcircus.agent import Agent, agent, is_token

OWN_KEYS = (
    "vm",
    "hypervisor-snapshot",
    "consul",
    "consul-token-file",
    "consul_acl_token",
    "consul-ca-file",
    "consul-timeout",
)
KEYS = (*ceph.KEYS, *OWN_KEYS)


class Config(NamedTuple):
    """The images of the VM that its hypervisor knows as `vm`, and how long to wait for that.

    `policy`: whether to ask the hypervisor, and to do without it when it takes no snapshot.
    """

    ceph: ceph.Config
    vm: str
    agent: Agent
    policy: Policy = Policy.PREFER
    timeout_s: int = 90


def read_config(settings: Mapping[str, Any]) -> Config:
    """What a job's `source` section (without `type`) says; ConfigError."""
    for key in sorted(settings.keys() - set(KEYS)):
        close = get_close_matches(key, KEYS, n=1)
        suggestion = f"did you mean {close[0]!r}? " if close else ""
        raise _wrong(f"unknown key {key!r}", f"{suggestion}known are: {', '.join(KEYS)}")
    if "vm" not in settings:
        raise _wrong("the key 'vm' is missing", "it is what the hypervisor calls the VM")
    return Config(
        _images({key: value for key, value in settings.items() if key not in OWN_KEYS}),
        _text(settings, "vm"),
        _agent(settings),
        _policy(settings),
        _timeout(settings),
    )


def _images(settings: Mapping[str, Any]) -> ceph.Config:
    try:
        return ceph.read_config(settings)
    except ConfigError as exc:
        raise _wrong(exc.message.removeprefix("source ceph-rbd: "), exc.hint) from exc


def _agent(settings: Mapping[str, Any]) -> Agent:
    token = settings.get("consul_acl_token") or ""  # null: none, as for Backy
    if token and not (isinstance(token, str) and is_token(token)):
        raise _wrong("`consul_acl_token` is no token")  # which is not told
    if token and "consul-token-file" in settings:
        raise _wrong("give either `consul-token-file` or `consul_acl_token`")
    paths = {key: _path(settings, key) for key in ("consul-token-file", "consul-ca-file")}
    try:
        return agent(
            _text(settings, "consul"),
            token_file=paths["consul-token-file"],
            secret=token,
            ca_file=paths["consul-ca-file"],
        )
    except ConfigError as exc:
        raise _wrong(exc.message, exc.hint) from exc


def _policy(settings: Mapping[str, Any]) -> Policy:
    value = settings.get("hypervisor-snapshot", Policy.PREFER)
    if value not in list(Policy):
        raise _wrong(f"`hypervisor-snapshot` must be require, prefer or never, not {value!r}")
    return Policy(value)


def _timeout(settings: Mapping[str, Any]) -> int:
    value = settings.get("consul-timeout", 90)
    if not isinstance(value, str | int) or isinstance(value, bool):
        raise _wrong(f"`consul-timeout` must be an interval, not {value!r}")
    try:
        return parse_interval(value)
    except UsageError as exc:
        raise _wrong(f"`consul-timeout`: {exc.message}", exc.hint) from exc


def _path(settings: Mapping[str, Any], key: str) -> str:
    path = _text(settings, key)
    if path and not path.startswith("/"):
        raise _wrong(f"`{key}` must be an absolute path, not {path!r}")
    return path


def _text(settings: Mapping[str, Any], key: str) -> str:
    value = settings.get(key, "")
    if not isinstance(value, str) or (key in settings and not value) or not value.isprintable():
        raise _wrong(f"`{key}` must be a text, not {value!r}")
    return value


def _wrong(what: str, hint: str = "") -> ConfigError:
    return ConfigError(f"source flyingcircus: {what}", hint=hint)
