"""What the machine itself must have, and the line that installs each thing it lacks."""

from __future__ import annotations

import importlib.util
import platform
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

#: Bytes that pip needs for the environment and its downloads, CPU and CUDA build of torch.
LEAST_DISK = 4 * 10**9
CUDA_DISK = 12 * 10**9

#: The newest Python that PyBullet, which renders the tabletop, has wheels for.
PYBULLET_NEWEST = (3, 11)

APT = "sudo apt-get update && sudo apt-get install -y"

#: Program -> Debian and Ubuntu package.
PROGRAMS: Mapping[str, str] = {"bash": "bash", "gcc": "gcc", "g++": "g++", "make": "make"}


def missing_prerequisites(
    root: str | Path,
    *,
    installing: bool = True,
    extras: Sequence[str] = (),
    python: tuple[int, int] = sys.version_info[:2],
    which: Callable[[str], str | None] = shutil.which,
    has_module: Callable[[str], bool] = lambda name: importlib.util.find_spec(name) is not None,
    free_bytes: Callable[[Path], int] = lambda path: shutil.disk_usage(path).free,
    machine: str | None = None,
) -> list[str]:
    """One text per thing that is missing, each ending with what to do; empty when all is there.

    `installing` says whether packages are still to be installed, which takes disk space. The
    other arguments let a test stand in for the machine.
    """
    root = Path(root)
    machine = machine or f"{platform.system()} {platform.machine()}"
    problems = []
    if machine != "Linux x86_64":
        problems.append(
            f"This is {machine}; the ROS 2 wheels exist for Linux x86_64 only.\n"
            "  On a robot: install ROS 2 Jazzy and build with colcon, see docs/robot.md."
        )
    if any(character.isspace() or character in "'\"$:;" for character in str(root)):
        problems.append(
            f"The path of this checkout, {str(root)!r}, holds a space, a quote, a colon or a "
            "dollar sign.\n  CMake, colcon and the generated scripts fail on such a path: move the "
            "checkout."
        )
    packages = [package for program, package in PROGRAMS.items() if which(program) is None]
    lacking = [program for program in PROGRAMS if which(program) is None]
    if lacking:
        problems.append(f"Not found: {', '.join(lacking)}.\n  {APT} {' '.join(packages)}")
    if not (has_module("venv") and has_module("ensurepip")):
        version = f"python{sys.version_info[0]}.{sys.version_info[1]}"
        problems.append(
            f"{sys.executable} has no venv module with pip in it.\n"
            f"  {APT} {version}-venv   # or python3-venv"
        )
    if "tabletop" in extras and python > PYBULLET_NEWEST:
        problems.append(
            f"PyBullet's wheels stop at Python {PYBULLET_NEWEST[0]}.{PYBULLET_NEWEST[1]}; this is "
            f"{python[0]}.{python[1]}.\n"
            "  make evaluate PYTHON=/path/to/python3.11   # makes .venv anew with that one"
        )
    if installing:
        problems += _disk_problems(free_bytes(root))
    return problems


def _disk_problems(free: int) -> list[str]:
    if free >= LEAST_DISK:
        return []
    return [
        f"{free / 1e9:.1f} GB are free here; the set-up needs {LEAST_DISK / 1e9:.0f} GB "
        f"({CUDA_DISK / 1e9:.0f} GB where pip finds only torch's CUDA build).\n"
        "  Free some space, or put the checkout on a larger disk."
    ]
