"""The name by which plug-ins know `backyfs.cancelling`."""

from __future__ import annotations

from backyfs.cancelling import Check, checking, checkpoint

__all__ = ["Check", "checking", "checkpoint"]
