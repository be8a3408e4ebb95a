"""The doctor's look at torch, the device, memory, weights, and whether answers hold NaN."""

from __future__ import annotations

import glob
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from librobot_vlm_ros.doctor.child_process import ask_torch
from librobot_vlm_ros.doctor.finding import Finding, gib, ok, problem, warning
from librobot_vlm_ros.models.backend import ModelInfo

#: The least versions that work, as in setup.py (a test compares).
MINIMUM = {"torch": (2, 4), "transformers": (5, 0)}
_PROBE_S = 1800.0
_FACTS_S = 120.0


class ModelDoctor:
    """One model with its weights on one device."""

    def __init__(self, info: ModelInfo, weights: str, device: str, dtype: str) -> None:
        self._info, self._weights, self._device, self._dtype = info, weights, device, dtype
        self._needs_torch = "torch" in info.requires
        self._placed: dict[str, Any] = {}
        self._fitting: list[str] = []
        self._own = False

    def check_libraries(self) -> Iterator[Finding]:
        """torch, CUDA, transformers."""
        asked = {"model": self._info.name, "device": self._device, "dtype": self._dtype}
        facts, why = ask_torch(asked, _FACTS_S)
        known = {fact["fact"]: fact for fact in facts}
        missing = {"error": why or "it said nothing"}
        yield self._library("torch", known.get("torch", missing))
        if "error" in known.get("torch", missing):
            return
        yield self._cuda(known.get("cuda", missing), known["torch"])
        yield self._library("transformers", known.get("transformers", missing))
        if "error" in known.get("transformers", missing):
            return
        placed = known.get("placement", missing)
        if "error" in placed:
            yield problem("device", placed["error"], "choose others with --device, --dtype")
        else:
            self._placed = placed
            yield ok("device", f"{placed['device']}, {placed['dtype']}")

    def check_memory(self) -> Iterator[Finding]:
        """Free memory against the weights by dtype."""
        from librobot_vlm_ros.models.backend import BYTES_PER_PARAMETER
        from librobot_vlm_ros.runtime.loader import HEADROOM, available_memory_bytes

        if not self._placed or not self._info.parameters:
            return
        free = self._placed["free_bytes"]  # of a GPU
        if free is None:
            free = available_memory_bytes()
        if free is None:
            yield warning("memory", "how much is free is not told by this system")
            return
        needs = {kind: self._info.memory_bytes(kind) * HEADROOM for kind in BYTES_PER_PARAMETER}
        fit = [kind for kind, need in needs.items() if need <= free]
        self._fitting = [kind for kind in fit if "float" in kind]
        del needs["bfloat16"]  # as float16
        listed = ", ".join(f"{kind} {gib(need)}" for kind, need in needs.items())
        text = f"{gib(free)} free on {self._placed['device']}; {self._info.name} takes {listed}"
        wanted = self._placed["dtype"]
        if wanted in fit:
            yield ok("memory", text)
        elif fit:
            way = f"dtype:={fit[0]}" if fit[0].startswith("float") else f"quantization:={fit[0]}"
            yield warning("memory", f"{text}; {wanted} does not fit", way)
        else:
            fix = "end what takes memory, take a smaller model, or another computer"
            yield problem("memory", f"{text}: nothing fits", fix)

    def check_weights(self) -> Iterator[Finding]:
        """Whether they are here, and where."""
        info = self._info
        if self._weights or info.default_pretrained or info.shipped_folder:
            found = self._find_weights()
            self._own = found.status == "ok"
            yield found

    def _find_weights(self) -> Finding:
        from librobot_vlm_ros.models.checkpoints.hub import (
            downloaded,
            is_hub_id,
            shipped_folder,
            weights_present,
        )

        info, wanted = self._info, self._weights
        if wanted and Path(wanted).expanduser().is_dir():
            return _look_into(Path(wanted).expanduser())
        if not wanted and info.shipped_folder is not None:
            folder = shipped_folder() / info.shipped_folder
            if weights_present(info):
                return ok("weights", f"ship with the package: {folder}")
            fix = "install the package whole; git clones need no extra step"
            return problem("weights", f"{folder} holds none", fix)
        if wanted and not is_hub_id(wanted):
            fix = "name a folder with config.json and *.safetensors, or a hub id (owner/name)"
            return problem("weights", f"{wanted} is no folder and no hub id", fix)
        hub_id, _, revision = (wanted or str(info.default_pretrained)).partition("@")
        if not revision and hub_id == info.default_pretrained:
            revision = info.pinned_revision or ""
        here = downloaded(hub_id, revision or None)
        named = f"{hub_id} at {revision or 'main'}"
        if here is not None:
            return ok("weights", f"{named}: {here}")
        pin = f" --revision {revision}" if revision else ""
        offline = os.environ.get("HF_HUB_OFFLINE", "0").lower() in ("1", "true", "yes", "on")
        return Finding(
            "weights",
            "problem" if offline else "warning",
            f"{named} is not downloaded" + (" and HF_HUB_OFFLINE is set" if offline else ""),
            f"with a network: hf download {hub_id}{pin}"
            + ("" if offline else " (or the first use does it)")
            + "; a folder with config.json and *.safetensors: weights:=/path/to/folder (--weights)"
            "; or the model that ships with this package: model:=florence-2-tabletop (--model)",
        )

    def check_answers(self) -> Iterator[Finding]:
        """A picture asked in each dtype that the device does."""
        if not self._placed or not self._needs_torch:
            return
        own = self._own and bool(self._fitting)
        asked = {
            "model": self._info.name,
            "weights": self._weights,
            "device": self._placed["device"],
            "own": own,
            "dtypes": self._fitting if own else None,
            "probe": True,
        }
        facts, why = ask_torch(asked, _PROBE_S)
        which = self._info.name if own else f"tiny {self._info.family}"
        for fact in facts:
            if fact["fact"] == "probe":
                yield self._answer(fact, which)
        if why:
            fix = "look into the system's log (dmesg): memory, driver, processor"
            yield problem("NaN probe", f"{which}: {why}", fix)

    def _answer(self, fact: dict[str, Any], which: str) -> Finding:
        dtype = fact["dtype"]
        name = f"NaN probe {dtype}"
        if "error" in fact:
            used = dtype in (self._placed["dtype"], "any")
            fix = "the error says what to do" if used else f"leave {dtype} alone on this device"
            return Finding(name, "problem" if used else "warning", f"{which}: {fact['error']}", fix)
        text = f"{which}, {fact['seconds']:.1f} s"
        if fact["finite"]:
            return ok(name, f"{text}: answers without NaN")
        if dtype == "float32":
            fix = "the weights or the device are damaged: load the weights anew, try another device"
            return problem(name, f"{text}: NaN", fix)
        fix = "dtype:=bfloat16 or float32 (the node changes by itself when it meets NaN)"
        return warning(name, f"{text}: NaN", fix)

    def _library(self, name: str, fact: dict[str, Any]) -> Finding:
        if "error" in fact:
            anew = "" if "No module named" in fact["error"] else "--force-reinstall "
            return Finding(
                name,
                "problem" if self._needs_torch else "warning",
                f"cannot be imported: {fact['error']}",
                f"pip install {anew}{name}",
            )
        version = fact["version"]
        least = ".".join(map(str, MINIMUM[name]))
        numbers = tuple(int(part) for part in version.split("+")[0].split(".")[:2])
        if numbers < MINIMUM[name]:
            return problem(name, version, f"pip install -U '{name}>={least}'")
        return ok(name, version)

    def _cuda(self, fact: dict[str, Any], torch: dict[str, Any]) -> Finding:
        if "error" in fact:
            fix = "nvidia-smi says whether the driver works"
            return warning("cuda", f"cannot be asked: {fact['error']}", fix)
        if fact["gpus"]:
            gpus = [
                f"{gpu['name']} ({gib(gpu['free'])} of {gib(gpu['total'])} free, "
                f"capability {gpu['capability']})"
                for gpu in fact["gpus"]
            ]
            return ok("cuda", f"{torch['cuda_build']}: {'; '.join(gpus)}")
        if not glob.glob("/dev/nvidia[0-9]*"):
            return ok("cuda", "no GPU: models run on the CPU")
        if torch["cuda_build"] is None:
            fix = "install the CUDA build of torch: see pytorch.org"
            return warning("cuda", "there is a GPU, but this torch is a CPU build", fix)
        fix = f"the driver must be made for CUDA {torch['cuda_build']}: see nvidia-smi"
        return warning("cuda", "there is a GPU, but torch cannot use it", fix)


def _look_into(folder: Path) -> Finding:
    files = [*folder.glob("*.safetensors"), *folder.glob("*.bin")]
    if not (folder / "config.json").is_file() or not files:
        fix = "a checkpoint folder holds config.json and *.safetensors"
        return problem("weights", f"{folder} is none", fix)
    fix = "the download or copy is not complete: do it again"
    named: set[str] = set()  # by an index; `checkpoints.shards` would need torch
    try:
        for index in folder.glob("*.index.json"):
            named |= set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        missing = sorted(name for name in named if not (folder / name).is_file())
    except Exception as error:  # a broken index makes Python raise this or that
        return problem("weights", f"{folder}: no index of shards: {error!r}", fix)
    if missing:
        return problem("weights", f"{folder} lacks {', '.join(missing[:3])}", fix)
    size = sum(path.stat().st_size for path in files)
    return ok("weights", f"{folder}: {gib(size)} in {len(files)} files")
