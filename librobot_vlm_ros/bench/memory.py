"""Rows about memory and starting, each in a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from librobot_vlm_ros.bench.measure import Bench


def in_a_process(code: str, *arguments: str) -> dict[str, Any]:
    """Run Python code that prints one line of JSON; what it printed."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"}
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        capture_output=True,
        text=True,
        timeout=240,
        env=environment,
        check=False,
    )
    if done.returncode:
        raise RuntimeError(f"a process of the bench failed: {done.stderr[-800:]}")
    found: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return found


def write_large(folder: Path) -> None:
    """A Florence-2 folder of about 200 MB, without a tokenizer."""
    import torch
    from transformers import Florence2ForConditionalGeneration

    from librobot_vlm_ros.models.families.florence2.configuration import FlorenceConfig
    from librobot_vlm_ros.models.testing.florence2 import TINY_VISION

    torch.manual_seed(0)
    text = {"encoder_layers": 2, "decoder_layers": 2, "vocab_size": 20000}  # few layers, wide
    config = FlorenceConfig(vision_config={**TINY_VISION, "projection_dim": 768}, text_config=text)
    module = Florence2ForConditionalGeneration(config.to_transformers())
    module.save_pretrained(str(folder))


#: Resident memory that is the process's own or of files, at its highest, over what it was before.
_PEAK = """
import json, sys, threading, time
import psutil, torch
import librobot_vlm_ros.models as models
from librobot_vlm_ros.models.checkpoints.loading import load_module
import librobot_vlm_ros.models.families.florence2.model
import transformers.models.florence2.modeling_florence2
torch.set_num_threads(1)
torch.zeros(1, device=sys.argv[2])
me = psutil.Process()
before, peak, done = me.memory_info().rss, 0, threading.Event()
def watch():
    global peak
    while not done.is_set():
        peak = max(peak, me.memory_info().rss)
        time.sleep(0.002)
watcher = threading.Thread(target=watch); watcher.start()
module = load_module(sys.argv[1], "float32", sys.argv[2])
done.set(); watcher.join()
held = sum({t.data_ptr(): t.nbytes for t in module.parameters()}.values())
print(json.dumps({"peak": peak - before, "weights": held}))
"""

_START = """
import json, sys, time
started = time.perf_counter()
import torch
import numpy as np
if sys.argv[1] == "ours":
    from librobot_vlm_ros.core import Frame, InferenceRequest
    from librobot_vlm_ros.models import create_backend
    vlm = create_backend("florence-2-tabletop", device=sys.argv[2])
    vlm.warm_up()
    frame = Frame(np.zeros((480, 640, 3), np.uint8), "c", 1)
    vlm.run([InferenceRequest("r", frame, "caption")])
else:
    from transformers import Florence2ForConditionalGeneration, GenerationConfig
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
    from tokenizers import Tokenizer
    folder = sys.argv[3]
    model = Florence2ForConditionalGeneration.from_pretrained(folder).eval().to(sys.argv[2])
    tokenizer = Tokenizer.from_file(folder + "/tokenizer.json")
    images = CLIPImageProcessorPil.from_pretrained(folder)
    pixels = images(np.zeros((480, 640, 3), np.uint8), return_tensors="pt")["pixel_values"]
    count = int(sys.argv[4])
    words = tokenizer.encode("What does the image describe?").ids
    ids = torch.tensor([[*[model.config.image_token_id] * count, *words]]).to(sys.argv[2])
    with torch.inference_mode():
        model.generate(input_ids=ids, attention_mask=torch.ones_like(ids),
                       pixel_values=pixels.to(sys.argv[2]), max_new_tokens=20)
print(json.dumps({"seconds": time.perf_counter() - started}))
"""

_GROWTH = """
import gc, json, sys
import numpy as np, psutil, torch
from librobot_vlm_ros.core import Frame, GenerationParams, InferenceRequest
from librobot_vlm_ros.models import create_vlm
torch.set_num_threads(1)
vlm = create_vlm(sys.argv[1], pretrained=sys.argv[2], device=sys.argv[3])
random, me = np.random.default_rng(1), psutil.Process()
tasks = ("caption", "detect") if "florence" in sys.argv[1] else ("caption", "answer")
def one(number):
    height, width = random.integers(30, 300, 2)
    pixels = random.integers(0, 256, (height, width, 3), dtype=np.uint8)
    params = GenerationParams(max_new_tokens=int(random.integers(1, 70)))
    frame = Frame(pixels, "c", number, sequence=number)
    asked = [InferenceRequest("r", frame, task, prompt="a cube" if task == "answer" else "",
                              params=params) for task in tasks[: 1 + number % 2]]
    for entry in vlm.run(asked):
        if isinstance(entry, Exception):
            raise entry
def held():
    gc.collect()
    if sys.argv[3] != "cpu":
        return torch.cuda.memory_allocated() + me.memory_info().rss
    return me.memory_info().rss
count = int(sys.argv[4])
marks = []
for number in range(count):
    if number in (count // 2, 3 * count // 4):
        marks.append(held())
    one(number)
marks.append(held())
print(json.dumps({"half": marks[0], "three_quarters": marks[1], "end": marks[2]}))
"""


def loading(bench: Bench) -> None:
    """Peak of the host's memory while a folder of 200 MB is loaded, over the weights."""
    with tempfile.TemporaryDirectory(prefix="librobot-vlm-bench-") as scratch:
        folder = Path(scratch) / "large"
        write_large(folder)
        found = in_a_process(_PEAK, str(folder), bench.device)
    bench.add(
        "host memory at its highest while loading",
        [(found["weights"] / 2**20, found["peak"] / 2**20)],
        share=True,
        unit="MiB",
        note="against the bytes of the weights",
        target=1.15,
    )


def starting(bench: Bench) -> None:
    """From the start of Python to the first result, files cold as they come and then warm."""
    from librobot_vlm_ros.models import create_vlm, model_info
    from librobot_vlm_ros.models.checkpoints.hub import find_weights

    name = "florence-2-tabletop"
    folder = find_weights(model_info(name), None).folder
    count = create_vlm(name, device="cpu").processor.image_tokens
    times = []
    for run in range(3):
        if run == 0:
            _forget_files(folder)
        theirs = in_a_process(_START, "theirs", bench.device, str(folder), str(count))
        if run == 0:
            _forget_files(folder)
        ours = in_a_process(_START, "ours", bench.device)
        times.append((theirs["seconds"], ours["seconds"]))
    for label, part in (("cold", times[:1]), ("warm", times[1:])):
        bench.add(
            f"tabletop, start to first result, {label}",
            part,
            note="a process of its own, imports included; ours answers a warm-up question, too",
        )


def growth(bench: Bench, count: int = 1000) -> None:
    """Memory after many inferences at sizes and lengths of all kinds, over what it was half way."""
    from librobot_vlm_ros.models.testing.florence2 import tiny_florence_folder

    with tempfile.TemporaryDirectory(prefix="librobot-vlm-bench-") as scratch:
        folder = tiny_florence_folder(Path(scratch) / "tiny")
        started = time.perf_counter()
        found = in_a_process(_GROWTH, "florence-2-base", str(folder), bench.device, str(count))
        spent = time.perf_counter() - started
    bench.add(
        f"memory after {count} inferences",
        [(found["half"] / 2**20, found["end"] / 2**20)],
        share=True,
        unit="MiB",
        note=f"of the process, against half way; {spent:.0f} s, sizes and lengths vary",
        target=1.02,
    )


def _forget_files(folder: Path) -> None:
    """Ask the system to drop its copies of the files; where it can't, cold is as warm."""
    for path in folder.iterdir():
        if path.is_file() and hasattr(os, "posix_fadvise"):
            with path.open("rb") as file:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
