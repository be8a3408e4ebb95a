"""Python's C headers, which the build of the messages needs.

Debian and Ubuntu keep them in a package of their own (python3.X-dev), and a machine that has
python3, venv, gcc and g++ need not have it. Unpacking that package below `.venv` needs no root.
"""

from __future__ import annotations

import subprocess
import sys
import sysconfig
from pathlib import Path

VERSION = f"{sys.version_info[0]}.{sys.version_info[1]}"


def system_include() -> Path | None:
    """Folder with this interpreter's Python.h; None when the machine has none."""
    folder = Path(sysconfig.get_path("include"))
    return folder if (folder / "Python.h").is_file() else None


def unpacked_include(venv: Path) -> Path | None:
    """Folder with the Python.h that `unpack` put below `venv`; None when it did not yet."""
    folder = venv / "python-headers" / "usr" / "include" / f"python{VERSION}"
    return folder if (folder / "Python.h").is_file() else None


def unpack(venv: Path) -> tuple[Path | None, str]:
    """Download libpython3.X-dev from the machine's own apt sources and unpack it below `venv`.

    The include folder and "", or None and what went wrong.
    """
    target = venv / "python-headers"
    target.mkdir(parents=True, exist_ok=True)
    package = f"libpython{VERSION}-dev"
    # Lists and cache of our own: reading the machine's may need root, and a fresh image has none.
    lists, cache = target / "lists", target / "cache"
    (lists / "partial").mkdir(parents=True, exist_ok=True)
    (cache / "archives" / "partial").mkdir(parents=True, exist_ok=True)
    own = ["-o", f"Dir::State::Lists={lists}", "-o", f"Dir::Cache={cache}"]
    own += ["-o", "APT::Sandbox::User="]
    try:
        for command in (["apt-get", *own, "update"], ["apt-get", *own, "download", package]):
            subprocess.run(command, cwd=target, check=True, capture_output=True, text=True)
        for archive in target.glob("*.deb"):
            subprocess.run(["dpkg-deb", "-x", str(archive), str(target)], check=True)
            archive.unlink()
    except OSError as error:
        return None, str(error)
    except subprocess.CalledProcessError as error:
        return None, str(error.stderr or error).strip()
    include = unpacked_include(venv)
    return include, "" if include else f"{package} holds no Python.h"
