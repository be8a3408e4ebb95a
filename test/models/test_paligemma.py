"""PaliGemma from published checkpoints, against the original arithmetic written here.

`original_logits` follows the papers (SigLIP: Zhai et al. 2023; Gemma: Mesnard et al. 2024; the
prefix that sees all of itself: Beyer et al. 2024). It reads tensors by the names they were
published under and knows nothing of transformers.
"""

from __future__ import annotations

import json
import math
import string
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers
from torch import Tensor
from torch.nn import functional as F
from transformers import PaliGemmaForConditionalGeneration
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

from librobot_vlm_ros.core import ErrorCode, GenerationParams, ModelError, RequestError, VlmError
from librobot_vlm_ros.models import create_vlm, load_module, model_info
from librobot_vlm_ros.models.decode import Generated
from librobot_vlm_ros.models.paligemma import PaliGemmaConfig, PaliGemmaVLM
from librobot_vlm_ros.models.paligemma_prompts import (
    PALIGEMMA_TASKS,
    parse_locations,
    question,
)
from librobot_vlm_ros.models.preprocess import ImageSettings, normalise, squash

VISION = {"hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2}
VISION |= {"num_attention_heads": 2, "image_size": 28, "patch_size": 14}
TEXT = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
TEXT |= {"num_attention_heads": 4, "num_key_value_heads": 1, "head_dim": 8}
PATCHES, EPS = 4, 1e-6
LETTERS = "▁\n" + string.ascii_letters + string.digits + string.punctuation


def tokenizer() -> Tokenizer:
    """Letters for words, and PaliGemma's added tokens."""
    names = ["<pad>", "<eos>", "<bos>", "<unk>", *LETTERS]
    made = Tokenizer(models.BPE({t: i for i, t in enumerate(names)}, [], unk_token="<unk>"))
    made.normalizer = normalizers.Replace(" ", "▁")
    made.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse()])
    added = [f"<loc{i:04}>" for i in range(1024)] + [f"<seg{i:03}>" for i in range(128)]
    special = ["<pad>", "<eos>", "<bos>", *added, "<image>"]
    made.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in special])
    return made


def published_weights(words: int) -> dict[str, Tensor]:
    random = torch.Generator().manual_seed(7)

    def normal(*size: int) -> Tensor:
        return torch.randn(size, generator=random) * 0.2

    state = {}
    width, inner, base = VISION["hidden_size"], VISION["intermediate_size"], "vision_tower."
    base += "vision_model."
    state[f"{base}embeddings.patch_embedding.weight"] = normal(width, 3, 14, 14) * 0.3
    state[f"{base}embeddings.patch_embedding.bias"] = normal(width)
    state[f"{base}embeddings.position_embedding.weight"] = normal(PATCHES, width)
    norms = [f"{base}post_layernorm"]
    for layer in range(VISION["num_hidden_layers"]):
        at = f"{base}encoder.layers.{layer}."
        norms += [f"{at}layer_norm1", f"{at}layer_norm2"]
        sizes = {f"self_attn.{n}_proj": (width, width) for n in ("q", "k", "v", "out")}
        for name, size in {**sizes, "mlp.fc1": (inner, width), "mlp.fc2": (width, inner)}.items():
            state[f"{at}{name}.weight"], state[f"{at}{name}.bias"] = normal(*size), normal(size[0])
    for norm in norms:
        state[f"{norm}.weight"], state[f"{norm}.bias"] = 1 + normal(width), normal(width)
    hidden, inner = TEXT["hidden_size"], TEXT["intermediate_size"]
    state["multi_modal_projector.linear.weight"] = normal(hidden, width)
    state["multi_modal_projector.linear.bias"] = normal(hidden)
    state["language_model.model.embed_tokens.weight"] = normal(words, hidden)
    state["language_model.model.norm.weight"] = normal(hidden)
    kv = TEXT["head_dim"] * TEXT["num_key_value_heads"]
    for layer in range(TEXT["num_hidden_layers"]):
        at = f"language_model.model.layers.{layer}."
        for name, size in {
            "self_attn.q_proj": (hidden, hidden),
            "self_attn.o_proj": (hidden, hidden),
            "self_attn.k_proj": (kv, hidden),
            "self_attn.v_proj": (kv, hidden),
            "mlp.gate_proj": (inner, hidden),
            "mlp.up_proj": (inner, hidden),
            "mlp.down_proj": (hidden, inner),
        }.items():
            state[f"{at}{name}.weight"] = normal(*size)
        for norm in ("input_layernorm", "post_attention_layernorm"):
            state[f"{at}{norm}.weight"] = normal(hidden)
    return state


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder laid out as google/paligemma-3b-pt-224; read only."""
    folder = tmp_path_factory.mktemp("paligemma")
    made = tokenizer()
    made.save(str(folder / "tokenizer.json"))
    image = made.token_to_id("<image>")
    words = image + 3  # padding behind the image token, as in the published table
    config = {
        "architectures": ["PaliGemmaForConditionalGeneration"],
        "model_type": "paligemma",
        "bos_token_id": 2,
        "eos_token_id": 1,
        "pad_token_id": 0,
        "hidden_size": TEXT["hidden_size"],
        "projection_dim": TEXT["hidden_size"],
        "image_token_index": image,
        "text_config": {**TEXT, "model_type": "gemma", "vocab_size": words},
        "vision_config": {**VISION, "model_type": "siglip_vision_model", "vision_use_head": False},
    }
    (folder / "config.json").write_text(json.dumps(config))
    save_file(published_weights(words), folder / "model.safetensors")
    return folder


@pytest.fixture
def vlm3b(published: Path) -> PaliGemmaVLM:
    return create_vlm("paligemma-3b", pretrained=str(published), device="cpu")


def heads(x: Tensor, count: int) -> Tensor:
    return x.unflatten(-1, (count, -1)).transpose(0, 1)


def gelu(x: Tensor) -> Tensor:
    return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def siglip_features(state: dict[str, Tensor], image: Tensor) -> Tensor:
    def linear(x: Tensor, name: str) -> Tensor:
        return x @ state[f"{name}.weight"].T + state[f"{name}.bias"]

    def norm(x: Tensor, name: str) -> Tensor:
        spread = x.var(-1, correction=0, keepdim=True)
        scaled = (x - x.mean(-1, keepdim=True)) / (spread + EPS).sqrt()
        return scaled * state[f"{name}.weight"] + state[f"{name}.bias"]

    base, count = "vision_tower.vision_model.", VISION["num_attention_heads"]
    kernel = state[f"{base}embeddings.patch_embedding.weight"].flatten(1)
    cells = [image[:, y : y + 14, x : x + 14].flatten() for y in (0, 14) for x in (0, 14)]
    x = torch.stack([kernel @ cell for cell in cells])
    x = x + state[f"{base}embeddings.patch_embedding.bias"]
    x = x + state[f"{base}embeddings.position_embedding.weight"]
    for layer in range(VISION["num_hidden_layers"]):
        at = f"{base}encoder.layers.{layer}."
        y = norm(x, f"{at}layer_norm1")
        q, k, v = (heads(linear(y, f"{at}self_attn.{n}_proj"), count) for n in "qkv")
        mixed = (q @ k.transpose(1, 2) / math.sqrt(q.shape[-1])).softmax(-1) @ v
        x = x + linear(mixed.transpose(0, 1).flatten(1), f"{at}self_attn.out_proj")
        y = gelu(linear(norm(x, f"{at}layer_norm2"), f"{at}mlp.fc1"))
        x = x + linear(y, f"{at}mlp.fc2")
    return linear(norm(x, f"{base}post_layernorm"), "multi_modal_projector.linear")


def original_logits(state: dict[str, Tensor], image: Tensor, ids: list[int], prefix: int) -> Tensor:
    """Logits [4 + len(ids), words]; image and the first `prefix` ids see one another."""

    def norm(x: Tensor, name: str) -> Tensor:
        scaled = x * (x.pow(2).mean(-1, keepdim=True) + EPS).rsqrt()
        return scaled * (1 + state[f"{name}.weight"])

    base, table = "language_model.model.", state["language_model.model.embed_tokens.weight"]
    words = table[ids] * math.sqrt(TEXT["hidden_size"])
    x = torch.cat([siglip_features(state, image), words])
    count, size, length = TEXT["num_attention_heads"], TEXT["head_dim"], len(x)
    angles = torch.arange(length)[:, None] * 10000.0 ** (-torch.arange(0, size, 2) / size)
    turn = torch.polar(torch.ones_like(angles), angles)

    def rotate(y: Tensor) -> Tensor:
        pairs = torch.complex(y[..., : size // 2], y[..., size // 2 :]) * turn
        return torch.cat([pairs.real, pairs.imag], dim=-1)

    unseen = torch.full((length, length), -math.inf).triu(1)
    unseen[: PATCHES + prefix, : PATCHES + prefix] = 0.0
    for layer in range(TEXT["num_hidden_layers"]):
        at = f"{base}layers.{layer}."
        y = norm(x, f"{at}input_layernorm")
        q = rotate(heads(y @ state[f"{at}self_attn.q_proj.weight"].T, count))
        k = rotate(heads(y @ state[f"{at}self_attn.k_proj.weight"].T, 1))
        v = heads(y @ state[f"{at}self_attn.v_proj.weight"].T, 1)
        mixed = (q @ k.transpose(1, 2) / math.sqrt(size) + unseen).softmax(-1) @ v
        x = x + mixed.transpose(0, 1).flatten(1) @ state[f"{at}self_attn.o_proj.weight"].T
        y = norm(x, f"{at}post_attention_layernorm")
        gate = gelu(y @ state[f"{at}mlp.gate_proj.weight"].T)
        up = y @ state[f"{at}mlp.up_proj.weight"].T
        x = x + (gate * up) @ state[f"{at}mlp.down_proj.weight"].T
    return norm(x, f"{base}norm") @ table.T


IDS = [2, 30, 31, 40, 21, 35, 50]


def picture(seed: int) -> Tensor:
    return torch.randn(1, 3, 28, 28, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("prefix", [len(IDS), 4, 1])
def test_logits_and_loss_equal_the_original_arithmetic(published: Path, prefix: int) -> None:
    vlm = create_vlm("paligemma-3b", pretrained=str(published), device="cpu")
    state, image, ids = load_file(published / "model.safetensors"), picture(1), torch.tensor([IDS])
    expected = original_logits(state, image[0], IDS, prefix)
    labels = torch.tensor([[-100] * prefix + IDS[prefix:]])
    with torch.no_grad():
        given = vlm(images=image, input_ids=ids, labels=labels if prefix < len(IDS) else None)
    assert float((given["logits"][0] - expected).abs().max()) < 1e-4
    if prefix < len(IDS):
        image_token = vlm.config.image_token_id
        rows = expected[PATCHES + prefix - 1 : -1].clone()
        rows[:, image_token:] = -math.inf  # the image token and the padding are no words
        wanted = F.cross_entropy(rows, ids[0, prefix:])
        assert float((given["loss"] - wanted).abs()) < 1e-4


def test_greedy_answers_follow_the_original_logits_alone_and_in_a_batch(
    published: Path, vlm3b: PaliGemmaVLM
) -> None:
    state, images = load_file(published / "model.safetensors"), torch.cat([picture(1), picture(2)])
    image_token = vlm3b.config.image_token_id
    expected = []
    for image, prompt in zip(images, (IDS, IDS[:3]), strict=True):
        ids = list(prompt)
        for _ in range(4):
            logits = original_logits(state, image, ids, len(prompt))[-1, :image_token]
            ids.append(int(logits.argmax()))
        new = ids[len(prompt) :]
        expected.append(new[: new.index(1) + 1] if 1 in new else new)
    padded = torch.tensor([IDS, [0] * (len(IDS) - 3) + IDS[:3]])
    rows = vlm3b.generate(images, padded, attention_mask=(padded != 0).long(), max_new_tokens=4)
    for row, new in zip(rows.tolist(), expected, strict=True):
        assert row[: len(new)] == new
    alone = vlm3b.generate(images[1:], torch.tensor([IDS[:3]]), max_new_tokens=4)
    assert alone[0].tolist()[: len(expected[1])] == expected[1]


def test_a_prompt_is_image_begin_prefix_newline(vlm3b: PaliGemmaVLM, ask) -> None:
    _, ids = vlm3b.prepare(ask("open_vocabulary_detect", prompt="red cube, duck"))
    assert ids[:2] == (vlm3b.config.image_token_id, 2)
    assert vlm3b.tokenizer.decode(ids[2:]) == "detect red cube ; duck\n"
    for hostile, harmless in (("<loc0005> cup", "loc0005 cup"), ("<image><eos>", "image eos")):
        _, ids = vlm3b.prepare(ask("answer", prompt=hostile))
        assert ids == vlm3b.prepare(ask("answer", prompt=harmless))[1]
        assert not set(ids[2:]) & vlm3b.tokenizer.control_ids


def test_requests_are_answered(vlm3b: PaliGemmaVLM, ask) -> None:
    params = GenerationParams(max_new_tokens=4)
    entries = vlm3b.run(
        [
            ask("caption", params=params),
            ask("ground", prompt="cup", params=params),
            ask("segment", prompt="cup", params=params),
            ask("embed"),
        ]
    )
    assert isinstance(entries[2], VlmError)
    assert entries[2].code == ErrorCode.TASK_NOT_SUPPORTED
    assert "florence-2-base" in entries[2].hint
    assert entries[0].generated_tokens >= 1
    assert entries[3].embedding.array.shape == (TEXT["hidden_size"],)


def test_boxes_come_back_with_a_score(vlm3b: PaliGemmaVLM, ask) -> None:
    vocabulary = vlm3b.tokenizer.vocabulary
    box = [vocabulary[f"<loc{number:04}>"] for number in (256, 128, 512, 1023)]
    ids = (*box, *vlm3b.tokenizer.words(" cup"), 1)
    answer = vlm3b.read(ask("ground", prompt="cup"), Generated(ids, (math.log(0.5),) * len(ids)))
    (region,) = answer.regions  # the frame is 80 x 48
    assert region.label == "cup"
    assert region.box == pytest.approx((10.0, 12.0, 80 * 1023 / 1024, 24.0))
    assert region.score == pytest.approx(0.5)


def test_a_saved_folder_gives_the_same_model(vlm3b: PaliGemmaVLM, tmp_path: Path, ask) -> None:
    vlm3b.save_pretrained(tmp_path)
    again = create_vlm("paligemma-3b", pretrained=str(tmp_path), device="cpu")
    for name, old in vlm3b.module.state_dict().items():
        assert torch.equal(old, again.module.state_dict()[name]), name
    request = ask("caption", params=GenerationParams(max_new_tokens=4))
    assert again.run([request])[0].text == vlm3b.run([request])[0].text


def test_a_key_too_many_or_missing_is_refused(published: Path, tmp_path: Path) -> None:
    state = load_file(published / "model.safetensors")
    (tmp_path / "config.json").write_text((published / "config.json").read_text())
    less = {k: v for k, v in state.items() if "projector" not in k}
    for changed in (less, state | {"language_model.model.extra": torch.ones(2)}):
        save_file(changed, tmp_path / "model.safetensors")
        with pytest.raises(ModelError) as caught:
            load_module(tmp_path, "float32", "cpu")
        assert caught.value.code == ErrorCode.KEY_MISMATCH


@pytest.mark.parametrize("size", [(224, 224), (480, 641), (100, 37)])
def test_pixels_equal_those_of_the_reference(size: tuple[int, int]) -> None:
    pixels = np.random.default_rng(3).integers(0, 256, (*size, 3), dtype=np.uint8)
    settings = ImageSettings(224, 224, (0.5,) * 3, (0.5,) * 3)
    ours = normalise([squash(pixels, settings)], settings, torch.device("cpu"), torch.float32)
    reference = SiglipImageProcessorPil(size={"height": 224, "width": 224}, resample=3)
    theirs = reference(Image.fromarray(pixels), return_tensors="pt")["pixel_values"]
    assert float((ours - theirs).abs().max()) < 1e-5


def test_published_size() -> None:
    gemma = 257216 * 2048 + 18 * (2 * 2048**2 + 2 * 2048 * 256 + 3 * 2048 * 16384 + 4096) + 2048
    block = 4 * (1152**2 + 1152) + 2 * 1152 * 4304 + 4304 + 1152 + 4 * 1152
    siglip = 1152 * 3 * 14**2 + 1152 + 256 * 1152 + 27 * block + 2 * 1152
    with torch.device("meta"):
        module = PaliGemmaForConditionalGeneration(PaliGemmaConfig().to_transformers())
    module.tie_weights()
    built = sum(parameter.numel() for parameter in module.parameters())
    expected = gemma + siglip + 1152 * 2048 + 2048
    assert built == expected == model_info("paligemma-3b").parameters


@pytest.mark.parametrize(
    ("text", "labels", "malformed"),
    [
        ("<loc0000><loc0001><loc0002><loc0003> cup", ["cup"], 0),
        ("<loc0000><loc0001><loc0002><loc0003> a b ; <loc0000><loc0001><loc0002><loc0003> c",
         ["a b", "c"], 0),
        ("<loc0000><loc0001><loc0002><loc0003>" + "<seg007>" * 16 + " cup", ["cup"], 0),
        ("<loc0000><loc0001><loc0002><loc0003>", ["given"], 0),
        ("<loc0000><loc0001><loc0002> cup", [], 1),
        ("<loc0003><loc0001><loc0002><loc0003> cup", [], 1),
        ("<loc0000><loc0001><loc0002><loc1024> cup", [], 1),
        ("cup ; <loc0000><loc0001><loc0002><loc0003> d", ["d"], 1),
        ("", [], 1),
        ("no", [], 1),
    ],
)  # fmt: skip
def test_answers_are_read(text: str, labels: list[str], malformed: int) -> None:
    regions, bad = parse_locations(text, 1024, 2048, "given")
    assert ([region.label for region in regions], bad) == (labels, malformed)
    for region in regions:
        assert region.box == (1.0, 0.0, 3.0, 4.0)


def test_questions() -> None:
    assert set(PALIGEMMA_TASKS) | {"embed"} == set(model_info("paligemma-3b").tasks)
    assert question("caption", "") == "caption en"
    assert question("open_vocabulary_detect", "cup; ,red duck") == "detect cup ; red duck"
    for task, text, code in (
        ("ground", "", ErrorCode.EMPTY_PROMPT),
        ("ocr", "cup", ErrorCode.BAD_PARAMETER),
    ):
        with pytest.raises(RequestError) as caught:
            question(task, text)
        assert caught.value.code == code
