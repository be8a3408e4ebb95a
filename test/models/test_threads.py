"""Small steps are computed by one CPU thread, everything else by as many as torch was given."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from librobot_vlm_ros.core import EngineError, ErrorCode, GenerationParams
from librobot_vlm_ros.models import placement as threads
from librobot_vlm_ros.models.generation.loop import generate


@pytest.fixture
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def seen_while_answering(vlm: Any, beams: int, stop: Any = lambda row: None) -> list[int]:
    """Torch's threads at each token."""
    seen: list[int] = []

    def note(row: int) -> Any:
        seen.append(torch.get_num_threads())
        return stop(row)

    with vlm._answering():
        decoder, history = vlm._start(None, [[5, 6, 7]])
        rules = vlm.rules(GenerationParams(max_new_tokens=6, num_beams=beams))
        generate(decoder, rules, history, stop=note)
    return seen


@pytest.mark.parametrize("beams", [1, 3])
def test_a_small_decoder_takes_one_and_gives_them_back(
    vlm: Any, two_threads: None, beams: int
) -> None:
    # Before the first token the prompts may not have been taken in, which is work for all of them.
    assert set(seen_while_answering(vlm, beams)[1:]) == {1}
    assert torch.get_num_threads() == 2


def test_a_large_one_and_a_module_take_all(
    vlm: Any, two_threads: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    vlm.decoder = "module"
    assert set(seen_while_answering(vlm, 1)) == {2}
    vlm.decoder = "functional"
    monkeypatch.setattr(threads, "_LIGHT", 10)
    assert set(seen_while_answering(vlm, 1)) == {2}


def test_they_come_back_after_an_error(vlm: Any, two_threads: None) -> None:
    def broken(row: int) -> EngineError:
        raise EngineError(ErrorCode.CANCELLED, "enough")

    with pytest.raises(EngineError):
        seen_while_answering(vlm, 1, broken)
    assert torch.get_num_threads() == 2
