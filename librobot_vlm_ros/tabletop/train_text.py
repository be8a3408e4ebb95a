"""Stage two of the recipe: the text model, taught on the tower's channels as they ought to be.

Layouts are drawn, not rendered: each cell's channels are made from ground truth with noise, in
the order that ``train_tower`` teaches the tower. What the tower leaves free is noise here, so
that the projection learns to disregard it until both are trained together.

A thousand free vectors for the location tokens would each have to be learnt on their own. Here the
vector of bin k is a fixed smooth basis of k times a learnt matrix, so that what is learnt of one
bin holds for its neighbours; after training the product is written out as plain rows of the
embedding.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.rnn import pad_sequence

from librobot_vlm_ros.tabletop.labels import LABELS
from librobot_vlm_ros.tabletop.network import (
    BOS,
    CELLS,
    EOS,
    LOC_BINS,
    PAD,
    QUIET_X,
    QUIET_Y,
    build_model,
    build_tokenizer,
)
from librobot_vlm_ros.tabletop.samples import Sample
from librobot_vlm_ros.tabletop.targets import Question, detect_question, questions_of
from librobot_vlm_ros.tabletop.train_tower import BOX, COLOUR, KIND, owner_targets
from librobot_vlm_ros.tabletop.training import TrainingRun, options


def location_basis() -> torch.Tensor:
    """[1000, 26] over the bins: constant, linear, square, waves of falling length."""
    at = (torch.arange(LOC_BINS) + 0.5) / LOC_BINS
    parts = [torch.ones_like(at), at * 2 - 1, (at * 2 - 1) ** 2 * 1.5 - 0.5]
    for wave in (2.0, 1.4, 1.0, 0.7, 0.5, 0.35, 0.25, 0.18, 0.125, 0.09, 0.0625):
        for shift in (0.0, math.pi / 2):
            parts.append(torch.cos(2 * math.pi * at / wave + shift))
    return torch.stack(parts, 1)


def place_positions(embed: Any) -> None:
    """Start the position embeddings with smooth codes of the cell, in the tower's quiet channels.

    Left at random, they would drown in the channels they are added to, and no box could be read.
    """
    cells = torch.arange(embed.row_embeddings.num_embeddings, dtype=torch.float32)
    codes = [
        (cells - (CELLS - 1) / 2) / (CELLS / 3),
        ((cells - (CELLS - 1) / 2) / (CELLS / 3)) ** 2 - 1,
    ]
    for wave in (2.0, 1.0, 0.6, 0.4, 0.28, 0.2):
        for shift in (0.0, math.pi / 2):
            codes.append(torch.cos(2 * math.pi * cells / (wave * CELLS) + shift))
    code = torch.stack(codes[: QUIET_X.stop - QUIET_X.start], 1) * 2
    half = embed.column_embeddings.embedding_dim
    with torch.no_grad():
        embed.column_embeddings.weight.zero_()[:, QUIET_X] = code
        embed.row_embeddings.weight.zero_()[:, QUIET_Y.start - half : QUIET_Y.stop - half] = code


class TextTrainer(nn.Module):
    """Projector, BART and tied embedding of a Florence-2 module, trained with smooth locations."""

    basis: torch.Tensor

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.projector = model.model.multi_modal_projector
        self.text = model.model.language_model
        self.first = int(build_tokenizer().convert_tokens_to_ids("<loc_0>"))
        self.register_buffer("basis", location_basis())
        width = self.text.config.d_model
        self.loc_embed = nn.Parameter(torch.randn(self.basis.shape[1], width) * 0.03)
        place_positions(self.projector.image_position_embed)
        self.word_embed = nn.Parameter(torch.randn(self.first, width) * 0.04)

    def table(self) -> torch.Tensor:
        """The embedding [V, D] as it will be shipped."""
        tail = self.word_embed.new_zeros(1, self.word_embed.shape[1])
        return torch.cat([self.word_embed, self.basis @ self.loc_embed, tail])

    def write_back(self) -> None:
        """Write the table into the module, where ``lm_head`` is tied to it."""
        with torch.no_grad():
            self.text.shared.weight.copy_(self.table())

    def forward(self, features: torch.Tensor, questions: list[list[Question]], spread: float,
                noise: float = 0.0, keep: torch.Tensor | None = None,
                ) -> tuple[torch.Tensor, dict[str, float]]:  # fmt: skip
        """Loss and figures for features [B, D, C, C] and each frame's questions (as many for each).

        ``spread`` is the width in bins of a location's target; ``noise`` that of the locations fed;
        ``keep`` [B, K] the cells that are read (see :func:`cells_to_keep`), None for all.
        """
        each = len(questions[0])
        flat = [question for frame in questions for question in frame]
        image = self.projector(features)
        if keep is not None:
            image = self._only(image, keep)
        image = image.repeat_interleave(each, 0)
        table = self.table()
        prompt, mask = _padded([[BOS, *q.prompt, EOS] for q in flat])
        asked = F.embedding(prompt, table)
        if keep is not None:  # the prompt stands where it stands behind all the cells
            asked = asked + self._moved(CELLS * CELLS + 1, image.shape[1], asked.shape[1])
        states = torch.cat([image, asked], 1)
        seen = torch.cat([mask.new_ones(len(flat), image.shape[1]), mask], 1)
        encoded = self.text.encoder(inputs_embeds=states, attention_mask=seen).last_hidden_state
        answer, real = _padded([q.answer for q in flat])
        place = pad_sequence([torch.tensor(q.place) for q in flat], True, -1.0)
        fed = answer.clone()
        if noise:
            moved = fed + (torch.randn(fed.shape) * noise).round().long()
            moved = moved.clamp(self.first, self.first + LOC_BINS - 1)
            fed = torch.where(place >= 0, moved, fed)
        fed = torch.cat([torch.full_like(fed[:, :1], EOS), fed[:, :-1]], 1)
        decoded = self.text.decoder(
            inputs_embeds=F.embedding(fed, table),
            attention_mask=torch.cat([real[:, :1], real[:, :-1]], 1),
            encoder_hidden_states=encoded, encoder_attention_mask=seen, use_cache=False,
        ).last_hidden_state  # fmt: skip
        on = real.bool()
        logits = F.linear(decoded[on].float(), table)
        return self._loss(logits, answer[on], place[on], spread)

    def _moved(self, to: int, since: int, count: int) -> torch.Tensor:
        """What to add to ``count`` tokens at ``since`` so that they stand at ``to``."""
        positions = self.text.encoder.embed_positions
        rows, offset = positions.weight, positions.offset
        return rows[offset + to :][:count] - rows[offset + since :][:count]

    def _only(self, image: torch.Tensor, keep: torch.Tensor) -> torch.Tensor:
        positions = self.text.encoder.embed_positions
        rows, offset = positions.weight, positions.offset
        chosen = torch.gather(image, 1, (keep + 1)[..., None].expand(-1, -1, image.shape[2]))
        places = rows[offset + 1 + keep] - rows[offset + 1 :][: keep.shape[1]]
        return torch.cat([image[:, :1], chosen + places], 1)

    def _loss(self, logits: torch.Tensor, answer: torch.Tensor, place: torch.Tensor,
              spread: float) -> tuple[torch.Tensor, dict[str, float]]:  # fmt: skip
        located = place >= 0
        words = F.cross_entropy(logits[~located], answer[~located])
        chances = logits[located].log_softmax(-1)[:, self.first : self.first + LOC_BINS]
        bins = torch.arange(LOC_BINS) + 0.5
        away = (bins[None] - place[located][:, None] * LOC_BINS) / spread
        target = torch.softmax(-0.5 * away**2, -1)
        places = (
            -(target * chances).sum(-1).mean()
            + (target * target.clamp(min=1e-12).log()).sum(-1).mean()
        )
        with torch.no_grad():
            said = logits[located].argmax(-1) - self.first
            error = (said - answer[located] + self.first).abs()
            error = torch.where((said >= 0) & (said < LOC_BINS), error, LOC_BINS)
            figures = {
                "words": words.item(), "places": places.item(),
                "word_ok": (logits[~located].argmax(-1) == answer[~located]).float().mean().item(),
                "in15": (error <= 15).float().mean().item(),
                "in7": (error <= 7).float().mean().item(),
            }  # fmt: skip
        share = located.float().mean()
        return words * (1 - share) * 2 + places * share * 2, figures


def cells_to_keep(owners: list[np.ndarray], rng: np.random.Generator, count: int) -> torch.Tensor:
    """[B, count] cells in order: every cell with an object, and background drawn to fill.

    Two thirds of a frame's cells are empty table; reading fewer of them makes the text model's
    passes about three times cheaper. The last part of the training reads all.
    """
    rows = []
    for owner in owners:
        flat = owner.ravel()
        rank = rng.random(flat.size) + (flat == -1) * 1.0
        rows.append(np.sort(np.argpartition(rank, count)[:count]))
    return torch.from_numpy(np.stack(rows).astype(np.int64))


def _padded(rows: list[list[int]]) -> tuple[torch.Tensor, torch.Tensor]:
    """[B, T]: rows of ids, filled up at their ends, and where they are real."""
    ids = [torch.tensor(row) for row in rows]
    mask = [torch.ones_like(row) for row in ids]
    return pad_sequence(ids, batch_first=True, padding_value=PAD), pad_sequence(mask, True)


def random_layout(rng: np.random.Generator) -> Sample:
    """A drawn layout: 1 to 6 distinct labels with boxes and the cells they own, without pixels."""
    count = int(rng.integers(1, 7))
    labels = [str(label) for label in rng.choice(LABELS, count, replace=False)]
    boxes: list[tuple[float, float, float, float]] = []
    while len(boxes) < count:
        w, h = rng.uniform(0.055, 0.26), rng.uniform(0.07, 0.3)
        x, y = rng.uniform(0, 1 - w), rng.uniform(0, 1 - h)
        centre = (x + w / 2, y + h / 2)
        if all(
            abs(centre[0] - (b[0] + b[2]) / 2) > 0.4 * (w + b[2] - b[0]) / 2
            or abs(centre[1] - (b[1] + b[3]) / 2) > 0.4 * (h + b[3] - b[1]) / 2
            for b in boxes
        ):
            boxes.append((x, y, x + w, y + h))
    array = np.array(boxes, np.float32)
    order = np.argsort(array[:, 0] + array[:, 2])
    array, labels = array[order], [labels[i] for i in order]
    at = (np.arange(CELLS) + 0.5) / CELLS
    columns, rows = np.meshgrid(at, at)
    owner = np.full((CELLS, CELLS), -1, np.int8)
    for number in rng.permutation(count):
        a, b, c, d = array[number]
        across = (columns - (a + c) / 2) / ((c - a) / 2)
        down = (rows - (b + d) / 2) / ((d - b) / 2)
        owner[across**2 + down**2 < rng.uniform(0.7, 1.1)] = number
        row, column = int((b + d) / 2 * CELLS), int((a + c) / 2 * CELLS)
        owner[row, column] = number
    return Sample(np.zeros((0, 0, 3), np.uint8), tuple(labels), array, owner, owner)


def truth_features(samples: list[Sample], width: int, rng: np.random.Generator) -> torch.Tensor:
    """[B, width, C, C]: the tower's channels made from ground truth, with noise elsewhere."""
    shape = (len(samples), CELLS, CELLS)
    free = rng.normal(0, rng.uniform(0.3, 1.5, (len(samples), 1, 1, 1)), (*shape, width))
    out = free.astype(np.float32)
    out[..., KIND] = rng.normal(-1, 1, out[..., KIND].shape)
    out[..., COLOUR] = rng.normal(0, 2, out[..., COLOUR].shape)
    out[..., BOX] = rng.normal(0.3, 1, out[..., BOX].shape)
    for quiet in (QUIET_X, QUIET_Y):
        out[..., quiet] = rng.normal(0, 0.1, out[..., quiet].shape)
    for number, sample in enumerate(samples):
        kind, colour, ltrb = owner_targets(sample, sample.owner)
        places = np.indices(kind.shape)
        rows, columns = places[0], places[1]
        sure = rng.uniform(4, 9, kind.shape)
        out[number, rows, columns, KIND.start + kind] += sure
        on, tinted = kind > 0, colour >= 0
        cells = out[number]
        cells[tinted, COLOUR] = rng.normal(-1, 1, (int(tinted.sum()), COLOUR.stop - COLOUR.start))
        cells[rows[tinted], columns[tinted], COLOUR.start + colour[tinted]] += sure[tinted]
        cells[on, BOX] = ltrb[on] + rng.normal(0, 0.06, (int(on.sum()), 4))
    return torch.from_numpy(out).permute(0, 3, 1, 2)


def main() -> None:
    """``python -m librobot_vlm_ros.tabletop.train_text --out FILE --minutes M``."""
    parser = options(
        "Train the text model on ground-truth channels.", minutes=30, batch=6, rate=1.2e-3, seed=1
    )
    parser.add_argument("--out", type=Path, required=True, help="checkpoint, resumed if it exists")
    parser.add_argument("--alone", type=float, default=0.5, help="share of time on detection alone")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    model = build_model(attention="eager")
    width = model.config.vision_config.embed_dim[-1]
    trainer = TextTrainer(model)
    run = TrainingRun(
        args, args.out, {"reader": trainer}, clip={"reader": 1.0}, decay=0.01, warm=0.05,
        unit="scenes",
    )  # fmt: skip
    rng = np.random.default_rng([args.seed, run.rank, run.steps])
    while not run.done:
        # Detection alone first: it has most boxes for one pass of the encoder, and what it teaches
        # of reading cells and writing locations holds for the other questions.
        alone = run.share < args.alone
        layouts = [random_layout(rng) for _ in range(args.batch * (3 if alone else 1))]
        questions = [
            [detect_question(v.labels, v.boxes)] if alone else questions_of(v, rng) for v in layouts
        ]
        features = truth_features(layouts, width, rng)
        with torch.autocast("cpu", torch.bfloat16, enabled=args.bf16):
            keep = cells_to_keep([v.owner for v in layouts], rng, 60)
            loss, figures = trainer(features, questions, spread=4.0, noise=2.0, keep=keep)
        run.step(loss, figures, every=200)


if __name__ == "__main__":
    main()
