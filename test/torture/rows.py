"""The rows of the torture suite: each does its worst and gives its figures.

A row is a function of a scale (1.0 is the full run) that gives `cases`, `failures` and what it
measured. Rows about the node drive it as a process of its own over DDS.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import random
import resource
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

from librobot_vlm_ros.core import ErrorCode, VlmError, as_vlm_error

TEST = Path(__file__).resolve().parents[1]
Row = Callable[[float], dict[str, Any]]
ROWS: dict[str, Row] = {}


def row(function: Row) -> Row:
    """Make a row known by its function's name."""
    ROWS[function.__name__] = function
    return function


def borrowed(path: str) -> ModuleType:
    """A module of the tests by its file."""
    name = "torture_" + path.replace("/", "_").removesuffix(".py")
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, TEST / path)
        assert spec is not None
        assert spec.loader is not None
        sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])
    return sys.modules[name]


def wait_for(predicate: Callable[[], Any], timeout_s: float = 30.0, what: str = "") -> Any:
    """The predicate's value once it is true; TimeoutError after that time."""
    end = time.monotonic() + timeout_s
    while not (value := predicate()):
        if time.monotonic() >= end:
            raise TimeoutError(f"waited {timeout_s:g} s in vain for {what or predicate}")
        time.sleep(0.02)
    return value


def percentile(values: list[float], share: float) -> float:
    """The value that `share` of them do not exceed."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))] if ordered else 0.0


class Memory:
    """What a process holds, from /proc."""

    def __init__(self, pid: int) -> None:
        self._folder = Path(f"/proc/{pid}")

    def resident_mib(self) -> float:
        pages = int((self._folder / "statm").read_text().split()[1])
        return pages * resource.getpagesize() / 2**20

    def threads(self) -> int:
        return len(list((self._folder / "task").iterdir()))


@contextlib.contextmanager
def robot_and_node(fake: dict[str, Any] | None = None, **parameters: Any) -> Iterator[Any]:
    """(robot, vlm) in a ROS domain of their own, as the node's own tests have them."""
    from librobot_vlm_ros.cli.isolation import isolated_ros

    ros, common = borrowed("ros/conftest.py"), borrowed("conftest.py")
    parameters = {"model": "fake", "annotated": False, **parameters}
    if fake:
        parameters["model_config"] = json.dumps(fake)
    words = [sys.executable, "-m", "librobot_vlm_ros.ros.vlm_node", "--ros-args"]
    words += ["-r", "__ns:=/torture"]
    for name, value in parameters.items():
        words += ["-p", f"{name}:={json.dumps(value)}"]
    with isolated_ros(), tempfile.TemporaryDirectory() as folder:
        process = common.RunningProcess(words, Path(folder) / "log", dict(os.environ), None)
        robot = ros.Robot()
        try:
            yield robot, ros.Vlm(process, robot, "/torture/vlm", wait_for)
        finally:
            process.terminate()
            robot.close()


@row
def malformed_images(scale: float) -> dict[str, Any]:
    """Images that are none: refused with their code, at once, nothing kept."""
    module = borrowed("core/test_malformed_images.py")
    module.decode_compressed(module.picture(random.Random(0), "png"))
    cases, failures, slowest = int(10_000 * scale), 0, 0.0
    start = 0
    for index in range(cases):
        kind = module.KINDS[index % len(module.KINDS)]
        fields, codes = kind(random.Random(f"{module.SEED}-{index}"))
        code, seconds = module.outcome(fields)
        for _ in range(5):  # a busy machine may take the processor away in the middle
            if seconds <= module.TIME_LIMIT_S:
                break
            seconds = min(seconds, module.outcome(fields)[1])
        slowest = max(slowest, seconds)
        failures += code not in codes or seconds > module.TIME_LIMIT_S
        if index == 10 * len(module.KINDS):
            start = module.resident_bytes()
    growth = (module.resident_bytes() - start) / 2**20 if start else 0.0
    failures += growth > 32
    return _figures(cases, failures, slowest_best_of_6_ms=1000 * slowest, memory_growth_mib=growth)


def _nasty(rng: random.Random, tokens: list[str]) -> str:
    pieces = [
        lambda: rng.choice(tokens),
        lambda: chr(rng.randrange(32)),
        lambda: chr(rng.randrange(0xD800, 0xE000)),
        lambda: rng.choice(["red cube", "ball", "<loc_", "12>", "＜image＞", "\u202e", "\x1b[31m"]),
        lambda: chr(rng.randrange(0x20, 0x10FFFF)),
    ]
    return "".join(rng.choice(pieces)() for _ in range(rng.randrange(1, 40))) + " cube"


@row
def hostile_prompts(scale: float) -> dict[str, Any]:
    """Texts with every family's control tokens, through the tokenizer of the tiny Florence-2."""
    from librobot_vlm_ros.core import clean_prompt, escape_for_log
    from librobot_vlm_ros.models.tiny import word_tokenizer

    tokenizer = word_tokenizer()
    special = [t.content for t in tokenizer.get_added_tokens_decoder().values()]
    others = [
        "<image>",
        "<|im_end|>",
        "<|image_pad|>",
        "<IMG_CONTEXT>",
        "<start_of_turn>",
        "[INST]",
    ]
    numbers = {tokenizer.token_to_id(token) for token in special} - {tokenizer.token_to_id("<unk>")}
    cases, failures, slowest = int(500 * scale), 0, 0.0
    for index in range(cases):
        rng = random.Random(index)
        text = _nasty(rng, special + others)
        if index % 10 == 0:  # over-long
            text = (text + "x" * 2**20)[: 2**20]
            start = time.perf_counter()
            try:
                clean_prompt(text, required=True, control_tokens=special)
                failures += 1
            except VlmError as error:
                failures += error.code != ErrorCode.PROMPT_TOO_LONG
            slowest = max(slowest, time.perf_counter() - start)
            continue
        try:
            cleaned = clean_prompt(text, required=True, control_tokens=special)
        except VlmError as error:
            failures += error.code != ErrorCode.CONTROL_TOKEN_IN_PROMPT
            continue
        failures += bool(numbers & set(tokenizer.encode(cleaned, add_special_tokens=False).ids))
        failures += clean_prompt(cleaned, required=True, control_tokens=special) != cleaned
        failures += not escape_for_log(text).isprintable()
    return _figures(cases, failures, slowest_refusal_ms=1000 * slowest)


@row
def broken_checkpoints(scale: float) -> dict[str, Any]:
    """Folders broken in different ways: a code each, and the whole folder loads afterwards."""
    import pickle
    import shutil

    import torch
    from safetensors.torch import load_file, save_file

    from librobot_vlm_ros.models import create_vlm
    from librobot_vlm_ros.models.tiny import edit_json, tiny_florence_folder

    ran = Path(tempfile.mkdtemp()) / "ran"

    class Bomb:
        def __reduce__(self) -> Any:
            return (Path.touch, (ran,))

    def tensors(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], Any]:
        def apply(folder: Path) -> None:
            weights = load_file(folder / "model.safetensors")
            change(weights)
            save_file(weights, folder / "model.safetensors")

        return apply

    def first(weights: dict[str, Any]) -> str:
        return next(name for name in sorted(weights) if name.endswith("norm.weight"))

    def truncate(folder: Path) -> None:
        os.truncate(folder / "model.safetensors", 5000)

    def pickled(folder: Path) -> None:
        (folder / "model.safetensors").unlink()
        (folder / "pytorch_model.bin").write_bytes(pickle.dumps({"a": Bomb()}))

    def nan(weights: dict[str, Any]) -> None:
        weights[first(weights)][0] = float("nan")

    cases = [
        (lambda f: (f / "model.safetensors").unlink(), ErrorCode.WEIGHTS_NOT_FOUND),
        (truncate, ErrorCode.WEIGHTS_CORRUPT),
        (pickled, ErrorCode.UNSAFE_CHECKPOINT),
        (tensors(lambda w: w.update({first(w): torch.zeros(7)})), ErrorCode.SHAPE_MISMATCH),
        (tensors(lambda w: w.update(extra=torch.zeros(7))), ErrorCode.KEY_MISMATCH),
        (tensors(lambda w: w.pop(first(w))), ErrorCode.KEY_MISMATCH),
        (tensors(nan), ErrorCode.NAN_WEIGHTS),
        (lambda f: (f / "config.json").write_text("{"), ErrorCode.BAD_CONFIG),
        (lambda f: edit_json(f / "config.json", model_type="other"), ErrorCode.BAD_CONFIG),
        (lambda f: (f / "tokenizer.json").write_text("{"), ErrorCode.TOKENIZER_MISMATCH),
        (lambda f: (f / "model.safetensors").write_bytes(b""), ErrorCode.WEIGHTS_CORRUPT),
    ]
    failures, wrong = 0, []
    with tempfile.TemporaryDirectory() as base:
        good = tiny_florence_folder(Path(base) / "good")
        # Libraries keep modules of their own (activations): what one whole load leaves is the base.
        create_vlm("florence-2-base", pretrained=str(good), device="cpu").close()
        before = _modules()
        for number, (spoil, expected) in enumerate(cases):
            folder = Path(base) / str(number)
            shutil.copytree(good, folder)
            spoil(folder)
            try:
                create_vlm("florence-2-base", pretrained=str(folder), device="cpu")
                code = ErrorCode.OK
            except Exception as error:
                code = as_vlm_error(error).code
            if code != expected:
                failures += 1
                wrong.append(f"case {number}: {code.name}, expected {expected.name}")
        left = _modules() - before
        failures += left > 0
        create_vlm("florence-2-base", pretrained=str(good), device="cpu").close()
    failures += ran.exists()
    return _figures(
        len(cases), failures, modules_left=left, pickle_code_ran=ran.exists(), wrong=wrong
    )


def _modules() -> int:
    """Networks and layers alive in this process."""
    import gc

    import torch

    gc.collect()
    return sum(issubclass(type(thing), torch.nn.Module) for thing in gc.get_objects())


@row
def lifecycle_storm(scale: float) -> dict[str, Any]:
    """Random transitions, half of them invalid: the node stays, and stays the same size."""
    rng, labels = random.Random(1), ["configure", "activate", "deactivate", "cleanup"]
    cases = int(1000 * scale)
    with robot_and_node(image_topic="/torture/image", tasks=["caption"]) as (_, vlm):
        memory, accepted = Memory(vlm.process.pid), 0
        for label in labels * 5:  # warm-up
            vlm.change_state(label, 60.0)
        before = memory.threads(), memory.resident_mib()
        for _ in range(cases):
            accepted += vlm.change_state(rng.choice(labels), 60.0)
        if vlm.state == "active":
            vlm.change_state("deactivate", 60.0)
        if vlm.state == "inactive":
            vlm.change_state("cleanup", 60.0)
        after = memory.threads(), memory.resident_mib()
        failures = not vlm.process.alive
    failures += after[0] > before[0] + 2
    growth = after[1] - before[1]
    failures += growth > 32
    return _figures(
        cases, failures, accepted=accepted, threads=[before[0], after[0]],
        memory_growth_mib=growth,
    )  # fmt: skip


@row
def out_of_memory(scale: float) -> dict[str, Any]:
    """Every second request runs out: it fails coded, the next succeeds."""
    from librobot_vlm_ros.srv import Query

    cases, failures, slowest = max(4, int(100 * scale)), 0, 0.0
    with robot_and_node({"oom_every": 2}, tasks=[""], autostart=True) as (robot, vlm):
        ask = _asker(robot, vlm, Query)
        for number in range(cases):
            start = time.monotonic()
            response = ask()
            expected = ErrorCode.OUT_OF_MEMORY if number % 2 else ErrorCode.OK
            failures += response.error_code != expected
            slowest = max(slowest, time.monotonic() - start)
        failures += not vlm.process.alive
    failures += slowest > 1.0
    return _figures(cases, failures, slowest_answer_ms=1000 * slowest)


def _asker(robot: Any, vlm: Any, kind: Any) -> Callable[[], Any]:
    vlm.wait_for_state("active", 60.0)
    camera = borrowed("ros/conftest.py").CameraSim(robot, "/torture/unused")
    image = camera.message()
    return lambda: vlm.call(kind, "query", 30.0, task="caption", use_image=True, image=image)


@row
def service_flood(scale: float) -> dict[str, Any]:
    """1,000 calls a second at a slow model: refusals, and the state, still come at once."""
    from librobot_vlm_ros.srv import Query
    from lifecycle_msgs.srv import GetState

    seconds, rate = max(2.0, 60.0 * scale), 1000
    with robot_and_node({"latency_s": 0.2}, tasks=[""], autostart=True) as (robot, vlm):
        vlm.wait_for_state("active", 60.0)
        image = borrowed("ros/conftest.py").CameraSim(robot, "/torture/unused").message()
        client = robot.node.create_client(Query, f"{vlm.name}/query")
        client.wait_for_service(30.0)
        state, codes = [], []
        stop = threading.Event()

        def watch() -> None:
            while not stop.is_set():
                start = time.monotonic()
                vlm.call(GetState, "get_state", 60.0)
                state.append(time.monotonic() - start)

        watcher = threading.Thread(target=watch)
        watcher.start()
        request = Query.Request(task="caption", use_image=True, image=image)
        begun, futures = time.monotonic(), []
        while (passed := time.monotonic() - begun) < seconds:
            for _ in range(int(passed * rate) - len(futures)):
                futures.append(client.call_async(request))
            time.sleep(0.001)
        with contextlib.suppress(TimeoutError):  # who got no answer is counted below
            wait_for(lambda: all(f.done() for f in futures), 20.0)
        stop.set()
        watcher.join()
        codes = [f.result().error_code for f in futures if f.done()]
        failures = sum(code not in (ErrorCode.OK, ErrorCode.BUSY) for code in codes)
        failures += not vlm.process.alive
    p99 = 1000 * percentile(state, 0.99)
    failures += p99 > 250
    failures += len(futures) - len(codes)
    return _figures(
        len(futures), failures, calls_per_s=len(futures) / seconds,
        busy=codes.count(ErrorCode.BUSY), lost=len(futures) - len(codes), get_state_p99_ms=p99,
    )  # fmt: skip


@row
def signals(scale: float) -> dict[str, Any]:
    """SIGINT and SIGTERM in the middle of an inference: exit code 0 within 5 s."""
    from librobot_vlm_ros.srv import Query

    cases, failures, slowest = max(2, int(10 * scale)), 0, 0.0
    for number in range(cases):
        with robot_and_node({"latency_s": 6000}, tasks=[""], autostart=True) as (robot, vlm):
            vlm.wait_for_state("active", 60.0)
            camera = borrowed("ros/conftest.py").CameraSim(robot, "/torture/unused")
            vlm.call_later(Query, "query", task="caption", use_image=True, image=camera.message())
            time.sleep(0.5)  # the model's thread shows in no interface: time for it to begin
            start = time.monotonic()
            vlm.process.send([signal.SIGINT, signal.SIGTERM][number % 2])
            code = vlm.process.wait(20.0)
            took = time.monotonic() - start
            slowest = max(slowest, took)
            failures += code != 0 or took > 5.0 or "Traceback" in vlm.log()
    return _figures(cases, failures, slowest_s=slowest)


def _figures(cases: int, failures: int, **measured: Any) -> dict[str, Any]:
    rounded = {k: round(v, 3) if isinstance(v, float) else v for k, v in measured.items()}
    return {"cases": cases, "failures": int(failures), **rounded}
