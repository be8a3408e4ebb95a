"""How good the embedded model is, on full renders of seeds it never saw.

``make evaluate SEED=… FRAMES=…`` runs this; it needs PyBullet (the ``tabletop`` extra). The model
is asked through the same interface as the node asks it, and counted with the functions that the
demo uses; COCO's average precision (``ap``, ``ap50``, ``ap75``) ranks by the model's own scores.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

from librobot_vlm_ros.core import Frame, InferenceRequest, ModelAnswer, Region, VlmError
from librobot_vlm_ros.evaluation.metrics import (
    average_precision,
    caption_exact,
    detection_scores,
    grounding_hit,
)
from librobot_vlm_ros.tabletop.labels import LABELS
from librobot_vlm_ros.tabletop.scenes import FIRST_TRAINING_SEED, Scene, render_scene
from librobot_vlm_ros.tabletop.world import World


def _requests(scene: Scene, number: int, rng: np.random.Generator) -> list[InferenceRequest]:
    """Caption, detection, and one grounding of every object in the scene, by its label."""
    frame = Frame(scene.rgb, "evaluate", number, sequence=number)
    asked = [("caption", ""), ("detect", "")]
    forms = ("{}", "pick up the {}", "where is the {}")
    asked += [("ground", str(rng.choice(forms)).format(o.label)) for o in scene.objects]
    return [
        InferenceRequest(request_id=f"{number}-{i}", frame=frame, task=task, prompt=prompt)
        for i, (task, prompt) in enumerate(asked)
    ]


def score_scenes(model: Any, scenes: list[Scene], seed: int) -> dict[str, Any]:
    """Ask the model about every scene and count; raises the model's own error if one is refused."""
    rng = np.random.default_rng(seed)
    pairs: list[tuple[tuple[Region, ...], list[Region]]] = []
    hits: list[bool] = []
    exact: list[bool] = []
    missed: Counter[str] = Counter()
    for number, scene in enumerate(scenes):
        answers: list[ModelAnswer] = []
        for answer in model.run(_requests(scene, number, rng)):
            if isinstance(answer, VlmError):
                raise answer
            answers.append(answer)
        truth = [Region(o.label, float("nan"), *o.box) for o in scene.objects]
        caption, detection, *groundings = answers
        exact.append(caption_exact(caption.text, [o.label for o in scene.objects], LABELS))
        pairs.append((detection.regions, truth))
        found = Counter(region.label for region in detection.regions)
        missed.update(o.label for o in scene.objects if not found[o.label])
        for item, grounding in zip(scene.objects, groundings, strict=True):
            regions = [r for r in grounding.regions if r.label.lower() == item.label]
            hits.append(grounding_hit(regions, [item.box]))
    scores, ranked = detection_scores(pairs), average_precision(pairs)
    return {
        "frames": len(scenes), "objects": scores.expected, "precision": scores.precision,
        "recall": scores.recall, "mean_iou": scores.mean_iou,
        "ap": ranked.ap, "ap50": ranked.ap50, "ap75": ranked.ap75,
        "grounding_hit": sum(hits) / max(1, len(hits)),
        "caption_exact": sum(exact) / max(1, len(exact)),
        "most_missed": dict(missed.most_common(6)),
    }  # fmt: skip


def evaluate(
    seed: int, frames: int, out: Path, model_name: str, weights: str | None
) -> dict[str, Any]:
    """Render ``frames`` scenes of seeds ``seed``, ``seed + 1`` …, score, write
    ``out/summary.json``.

    Raises ValueError for seeds inside the training range.
    """
    if seed + frames > FIRST_TRAINING_SEED:
        raise ValueError(
            f"seeds {seed} to {seed + frames - 1} reach into those of the training renders, which "
            f"begin at {FIRST_TRAINING_SEED}; choose a smaller SEED"
        )
    from librobot_vlm_ros.models import create_backend

    model = create_backend(model_name, pretrained=weights)
    world, begun = World(), time.monotonic()
    scenes = []
    for number in range(frames):
        scenes.append(render_scene(world, seed + number))
        if (number + 1) % 20 == 0 or number + 1 == frames:
            print(f"rendered {number + 1} of {frames} frames", flush=True)
    rendered, begun = time.monotonic() - begun, time.monotonic()
    summary = {"model": model_name, "seed": seed, **score_scenes(model, scenes, seed)}
    summary |= {"render_s": round(rendered, 1), "answer_s": round(time.monotonic() - begun, 1)}
    out.mkdir(parents=True, exist_ok=True)
    (out / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
    return summary


def main() -> int:
    """``python -m librobot_vlm_ros.tabletop.evaluate --seed S --frames N --out DIR``."""
    parser = argparse.ArgumentParser(description="Score the embedded model on unseen renders.")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--frames", type=int, default=200)
    parser.add_argument("--out", type=Path, default=Path("build/evaluate"))
    parser.add_argument("--model", default="florence-2-tabletop")
    parser.add_argument("--weights", help="another folder of weights for the model")
    args = parser.parse_args()
    try:
        summary = evaluate(args.seed, args.frames, args.out, args.model, args.weights)
    except (ImportError, ValueError, VlmError) as error:
        print(f"evaluate: {error}", file=sys.stderr)
        return 1
    width = max(len(key) for key in summary)
    for key, value in summary.items():
        shown = f"{value:.3f}" if isinstance(value, float) else value
        print(f"{key:<{width}}  {shown}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
