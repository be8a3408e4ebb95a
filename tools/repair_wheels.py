"""Repair the exported CMake targets of the ROS message wheels.

They carry include paths of the machine that built the wheels, such as
`/opt/python/cp311-cp311/include/python3.11` and
`/opt/python/cp311-cp311/lib/python3.11/site-packages/numpy/_core/include`. CMake refuses to use a
target whose include path does not exist.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

_BUILDER = r"/opt/python/cp\d+-cp\d+t?"
_INCLUDE = re.compile(_BUILDER + r"/include/python3\.\d+t?")
_PACKAGES = re.compile(_BUILDER + r"/lib/python3\.\d+t?/site-packages")


def repair_text(text: str, include: str, site_packages: str) -> str:
    """`text` of a CMake file with the builder's two paths replaced by this environment's."""
    text = _INCLUDE.sub(lambda _: include, text)
    return _PACKAGES.sub(lambda _: site_packages, text)


def repair_folder(share: Path, include: str, site_packages: str) -> list[Path]:
    """Repair every `.cmake` file below `share`; the files that were changed, sorted.

    A file is replaced whole, so that an interrupted run leaves none half written.
    """
    changed = []
    for path in sorted(share.rglob("*.cmake")):
        text = path.read_text(encoding="utf-8")
        repaired = repair_text(text, include, site_packages)
        if repaired != text:
            part = path.with_name(path.name + ".part")
            part.write_text(repaired, encoding="utf-8")
            os.replace(part, path)
            changed.append(path)
    return changed
