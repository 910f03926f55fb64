"""Every precision runs on every family, and stays near the 16-bit logits as its bits allow."""

from pathlib import Path

import pytest
import torch

from omniserve.base.config import PRECISIONS, Options
from omniserve.engine.build import build
from tests.model.test_transformers import SHAPES, greedy, score
from tests.tiny import tiny_model

FAMILIES = ("gqa", "biases", "mistral-window", "mixtral", "qwen2", "qwen2-moe", "qwen3", "qwen3-moe")
LEAST = {"w16a16": 0.98, "w8a8": 0.98, "w4a8": 0.75}
"""Correlation with the logits of full precision; random weights are the hardest case for 4 bits."""


@pytest.mark.parametrize("name", FAMILIES)
def test_every_precision_runs(name: str, tmp_path: Path) -> None:
    path = tiny_model(tmp_path / "m", **SHAPES[name])  # type: ignore[arg-type]
    ids = torch.randint(0, 97, (150,), generator=torch.Generator().manual_seed(2)).tolist()

    def logits(word: str, group: int = 128) -> torch.Tensor:
        built = build(path, Options(precision=word, group_size=group, max_num_batched_tokens=64, max_num_seqs=4))
        assert all(len(tokens) == 5 for tokens in greedy(built, [ids[:7], ids[:70]], 5))
        return score(built, ids)

    exact = logits("w16a16kv32")
    for word in PRECISIONS:
        for group in (128, -1) if word.startswith("w4a8") else (128,):
            near = torch.corrcoef(torch.stack([logits(word, group).flatten(), exact.flatten()]))[0, 1]
            least = LEAST[word.split("kv")[0]]
            assert near > (least if not word.endswith("kv4") else 0.75), (word, group, float(near))
