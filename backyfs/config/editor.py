"""The configuration as a JSON schema, for editors that complete and check YAML by one.

    # yaml-language-server: $schema=/usr/share/backyfs/backy.schema.json

It is made from the same tables the program reads by. A schema cannot say everything (whether a
schedule's name exists); `backyfs check-config` can.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from backyfs.config.job import OPTIONS
from backyfs.config.keys import INTERVAL, described, section_schema
from backyfs.config.schedule import BUILT_IN
from backyfs.config.site import GLOBAL, JOB_EXTRA, MAINTENANCE

_NAME = "^[A-Za-z0-9][A-Za-z0-9._+-]{0,63}$"
_TAG = "^(?!manual:)[A-Za-z0-9][A-Za-z0-9._+: -]{0,63}$"


def json_schema() -> dict[str, Any]:
    """The schema of the whole file."""
    return {
        "$schema": "http://json-schema.org/draft-07/schema#",
        "title": "backyfs configuration",
        **_closed(
            {
                "include": _include(),
                "global": section_schema(GLOBAL),
                "maintenance": section_schema(MAINTENANCE),
                "schedules": _named({"$ref": "#/definitions/schedule"}),
                "jobs": _named({"$ref": "#/definitions/job"}),
                "api": {"deprecated": True, "description": "Backy's; not used"},
                "peers": {"deprecated": True, "description": "Backy's; not used"},
            }
        ),
        "definitions": {"rule": _rule(), "schedule": _schedule(), "job": _job()},
    }


def _closed(properties: Mapping[str, Any], *required: str) -> dict[str, Any]:
    value = {"type": "object", "properties": dict(properties), "additionalProperties": False}
    return {**value, "required": list(required)} if required else value


def _named(item: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "type": ["object", "null"],
        "patternProperties": {_NAME: item},
        "additionalProperties": False,
    }


def _include() -> dict[str, Any]:
    text = {"type": "string", "minLength": 1}
    return {
        "description": "further files with schedules and jobs; patterns, relative to this file",
        "oneOf": [text, {"type": "array", "items": text}],
    }


def _rule() -> dict[str, Any]:
    keep = {"type": "integer", "minimum": 1, "description": "how many are kept at least"}
    interval = {**INTERVAL.schema, "description": "time between two revisions with this tag"}
    return _closed({"interval": interval, "keep": keep}, "interval", "keep")


def _schedule() -> dict[str, Any]:
    return {
        "type": "object",
        "minProperties": 1,
        "patternProperties": {_TAG: {"$ref": "#/definitions/rule"}},
        "additionalProperties": False,
    }


def _job() -> dict[str, Any]:
    source = {
        "type": "object",
        "required": ["type"],
        "properties": {"type": {"type": "string", "minLength": 1}},
        "description": "type, and the keys of that type of source",
    }
    name = {"type": "string", "examples": list(BUILT_IN)}
    schedule = {
        "oneOf": [name, {"$ref": "#/definitions/schedule"}],
        "description": "a schedule's name, or its tags (default: daily)",
    }
    options = {name: described(key) for name, key in {**OPTIONS, **JOB_EXTRA}.items()}
    return _closed({"source": source, "schedule": schedule, **options}, "source")
