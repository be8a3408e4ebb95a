"""The steps of the set-up: what each depends on, whether it is due, how it is done."""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import python_headers
from progress import CommandError, elapsed, run_logged
from repair_wheels import repair_folder

PYTHON = f"{sys.version_info[0]}.{sys.version_info[1]}"
TRIES = 3

#: What the colcon build depends on by content, and the folders where only the names matter: with
#: --symlink-install an edited file counts at once, a new one must be linked.
BUILD_CONTENT = ("CMakeLists.txt", "package.xml", "msg/*.msg", "srv/*.srv", "action/*.action")
BUILD_NAMES = ("librobot_vlm_ros", "launch", "config")


class SetUpError(Exception):
    """A step failed; the text says which, why and what to do."""


@dataclass(frozen=True)
class Step:
    """One part of the set-up."""

    name: str
    title: str
    key: str
    act: Callable[[], None]


def digest(parts: Iterable[str]) -> str:
    """A short hash of texts, sensitive to where each ends."""
    total = hashlib.sha256()
    for part in parts:
        total.update(part.encode("utf-8", "surrogateescape") + b"\0")
    return total.hexdigest()[:16]


def content_of(root: Path, patterns: Sequence[str]) -> list[str]:
    """Names and texts of the files that match, in a fixed order."""
    files = sorted(path for pattern in patterns for path in root.glob(pattern))
    return [f"{path.relative_to(root)}\n{path.read_text(encoding='utf-8')}" for path in files]


def names_below(root: Path, folders: Sequence[str]) -> list[str]:
    """Paths of the files in `folders`, leaving out what Python writes there."""
    return sorted(
        str(path.relative_to(root))
        for folder in folders
        for path in (root / folder).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    )


class SetUp:
    """The set-up of one checkout. A context manager: inside, no other set-up of it runs."""

    def __init__(self, root: str | Path, extras: Sequence[str] = ()) -> None:
        self.root = Path(root)
        self.venv = self.root / ".venv"
        self.python = self.venv / "bin" / "python"
        self.stamps = self.venv / ".set-up"
        self.colcon = self.root / "build" / "colcon"
        self.steps = self._steps(extras)

    def _steps(self, extras: Sequence[str]) -> list[Step]:
        # Each key holds the one before: a change makes every later step due too.
        venv = digest(["venv", str(self.root), PYTHON])
        pins = digest([venv, *content_of(self.root, ["requirements.txt", "constraints.txt"])])
        repairs = digest([pins, *content_of(self.root, ["tools/repair_wheels.py"])])
        build = digest(
            [
                repairs,
                *content_of(self.root, BUILD_CONTENT),
                *names_below(self.root, BUILD_NAMES),
            ]
        )
        steps = [
            Step("venv", "virtual environment .venv", venv, self._make_venv),
            Step("requirements", "requirements", pins, lambda: self._install("requirements.txt")),
            Step("repairs", "repairs of the ROS wheels", repairs, self._repair),
            Step("build", "colcon build of messages and package", build, self._build),
        ]
        for extra in extras:
            file = f"requirements-{extra}.txt"
            key = digest([pins, *content_of(self.root, [file])])
            step = Step(f"requirements-{extra}", file, key, lambda file=file: self._install(file))
            steps.append(step)
        return steps

    # --- whether ---------------------------------------------------------------------------------

    def __enter__(self) -> SetUp:
        (self.root / "build").mkdir(exist_ok=True)
        self._lock = (self.root / "build" / ".set-up.lock").open("a")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            print("[set-up] another set-up of this checkout runs: waiting for it", flush=True)
            fcntl.flock(self._lock, fcntl.LOCK_EX)
        return self

    def __exit__(self, *exc: object) -> None:
        self._lock.close()

    def due(self) -> list[str]:
        """Names of the steps that must run."""
        return [step.name for step in self.steps if not self._is_done(step)]

    def _is_done(self, step: Step) -> bool:
        if not self.python.exists():
            return False
        if step.name == "build" and not (self.root / "install" / "setup.bash").is_file():
            return False
        stamp = self.stamps / step.name
        return stamp.is_file() and stamp.read_text(encoding="utf-8") == step.key

    # --- doing -----------------------------------------------------------------------------------

    def run(self) -> None:
        """Run the steps that are due, in order, announcing each."""
        begun = time.monotonic()
        for number, step in enumerate(self.steps, 1):
            if self._is_done(step):
                continue
            place = f"[set-up {number}/{len(self.steps)}]"
            print(f"{place} {step.title}", flush=True)
            step_begun = time.monotonic()
            (self.stamps / step.name).unlink(missing_ok=True)  # half done is not done
            try:
                step.act()
            except CommandError as error:
                raise SetUpError(self._explain(step, error)) from error
            except OSError as error:
                raise SetUpError(f"{step.title}: {error}") from error
            self.stamps.mkdir(parents=True, exist_ok=True)
            (self.stamps / step.name).write_text(step.key, encoding="utf-8")
            print(f"{place} done in {elapsed(time.monotonic() - step_begun)}", flush=True)
        print(f"[set-up] ready after {elapsed(time.monotonic() - begun)}", flush=True)

    def _explain(self, step: Step, error: CommandError) -> str:
        tail = "".join(error.tail.splitlines(keepends=True)[-20:]).rstrip()
        advice = "Run the same command again: it goes on from this step."
        if error.looks_like_network:
            advice = "That looks like the network. " + advice
        log = os.path.relpath(error.log, self.root)
        return f"{step.title}: {error}\n\n{tail}\n\nAll of it is in {log}. {advice}"

    def _make_venv(self) -> None:
        if self.venv.exists():
            print("      the one that is there was made for another Python or place: making anew")
            shutil.rmtree(self.venv)
        # Started from inside a virtual environment, make ours of the interpreter behind it.
        base = getattr(sys, "_base_executable", None) or sys.executable
        log = self.root / "build" / "set-up-venv.log"
        run_logged([base, "-m", "venv", str(self.venv)], log, summarise=str)

    def _install(self, file: str) -> None:
        command = [str(self.python), "-m", "pip", "install", "--disable-pip-version-check"]
        command += ["--progress-bar", "off", "--retries", "8", "-r", file, "-c", "constraints.txt"]
        self.stamps.mkdir(parents=True, exist_ok=True)
        log = self.stamps / f"{Path(file).stem}.log"
        if file == "requirements.txt":
            print("      the first time this downloads about 0.6 GB (3 GB where pip finds only the")
            print(
                "      CUDA build of torch); pip keeps it, so nothing is fetched twice", flush=True
            )
        for attempt in range(1, TRIES + 1):
            try:
                run_logged(command, log, summarise=pip_progress, env=clean(), cwd=self.root)
                return
            except CommandError as error:
                if attempt == TRIES or not error.looks_like_network:
                    raise
                print(f"      the network failed; trying again ({attempt + 1}/{TRIES})", flush=True)
                time.sleep(5 * attempt)

    def _include(self) -> Path:
        include = python_headers.system_include() or python_headers.unpacked_include(self.venv)
        if include is None:
            print("      no Python.h here: unpacking it from the system's package sources")
            include, problem = python_headers.unpack(self.venv)
            if include is None:
                raise SetUpError(
                    f"Python's C headers are needed to build the messages; {problem}\n"
                    "  sudo apt-get update && sudo apt-get install -y "
                    f"python{PYTHON}-dev   # or python3-dev"
                )
        return include

    def _repair(self) -> None:
        packages = self.venv / "lib" / f"python{PYTHON}" / "site-packages"
        changed = repair_folder(self.venv / "share", str(self._include()), str(packages))
        print(f"      {len(changed)} CMake files")

    def _build(self) -> None:
        include = self._include()
        command = ["colcon", "--log-base", "log", "--log-level", "error", "build"]
        command += ["--base-paths", ".", "--build-base", "build/colcon", "--symlink-install"]
        command += ["--event-handlers", "console_direct+", "console_start_end-", "--cmake-args"]
        command += [f"-DPython3_EXECUTABLE={self.python}", "-DBUILD_TESTING=OFF"]
        env = clean()
        if include != python_headers.system_include():
            command.append(f"-DPython3_INCLUDE_DIR={include}")
            env["CPATH"] = str(include.parent)  # Debian's pyconfig.h lies in a sister folder
        self._forget_foreign_build()
        again = (self.colcon / "librobot_vlm_ros" / "CMakeCache.txt").exists()
        shell = ["bash", "-c", '. tools/env.sh wheels && exec "$@"', "set-up", *command]
        log = self.stamps / "build.log"
        try:
            run_logged(shell, log, summarise=build_progress, env=env, cwd=self.root)
        except CommandError:
            if not again:
                raise
            print("      failed over an older build; building from nothing", flush=True)
            self._forget_build()
            run_logged(shell, log, summarise=build_progress, env=env, cwd=self.root)
        remove_dangling_links(self.root / "install")
        self.colcon.joinpath(".made-for").write_text(self.steps[0].key, encoding="utf-8")

    def _forget_foreign_build(self) -> None:
        """A build of another place or Python cannot be gone on with: absolute paths are in it."""
        mark = self.colcon / ".made-for"
        if self.colcon.exists() and not (
            mark.is_file() and mark.read_text(encoding="utf-8") == self.steps[0].key
        ):
            self._forget_build()

    def _forget_build(self) -> None:
        for folder in (self.colcon, self.root / "install"):
            shutil.rmtree(folder, ignore_errors=True)


def clean() -> dict[str, str]:
    """This process's environment without what would lead pip or CMake to other packages."""
    led_astray = ("PYTHONPATH", "PYTHONHOME", "PIP_USER", "PIP_TARGET", "PIP_REQUIRE_VIRTUALENV")
    return {name: value for name, value in os.environ.items() if name not in led_astray}


def pip_progress(line: str) -> str | None:
    """What to show of a line of pip's."""
    if line.startswith(("Collecting ", "Building ", "Preparing ")):
        return line.split(" (from")[0]
    if line.startswith("Requirement already satisfied: "):
        return "there already: " + line.split(": ")[1].split(" in ")[0]
    if line.startswith("Downloading "):
        return line.replace("Downloading ", "downloading ").replace(".whl", "")
    if line.startswith("Installing collected packages"):
        return f"unpacking {line.count(',') + 1} packages"
    return None


def build_progress(line: str) -> str | None:
    """What to show of a line of make's: `[ 34%] Building C object ...`."""
    if line.startswith("[") and "%]" in line[:7]:
        percent, _, what = line.partition("] ")
        return f"{percent}] {what.rsplit('/', 1)[-1]}"
    return "configuring" if line.startswith("-- ") else None


def remove_dangling_links(folder: Path) -> list[Path]:
    """Remove links whose file is gone: what --symlink-install leaves of deleted modules."""
    gone = [path for path in folder.rglob("*") if path.is_symlink() and not path.exists()]
    for path in gone:
        path.unlink()
    return gone
