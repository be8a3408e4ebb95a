"""What a hub id looks like. Free of torch and of the hub's client."""

from __future__ import annotations

import re

__all__ = ["is_hub_id"]

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*(@[\w./-]+)?")


def is_hub_id(text: str) -> bool:
    """Whether `text` is "owner/name" or "owner/name@revision"."""
    return _HUB_ID.fullmatch(text) is not None
