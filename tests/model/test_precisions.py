"""Every precision runs on every family, and stays near the 16-bit logits as its bits allow."""

from pathlib import Path

import pytest
import torch

from omniserve.base.config import PRECISIONS, Options
from omniserve.engine.build import build
from omniserve.engine.device import weight_bytes
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


@pytest.mark.parametrize("tied", [True, False])
def test_an_8_bit_head(tied: bool, tmp_path: Path) -> None:
    """It moves the logits as little as 8 bits do, and greedy tokens are those of its own logits."""
    path = tiny_model(tmp_path / "m", **{**SHAPES["gqa"], "tied": tied})  # type: ignore[arg-type]
    ids = torch.randint(0, 97, (90,), generator=torch.Generator().manual_seed(2)).tolist()
    wide, narrow = (
        build(path, Options(precision="w16a16kv32", lm_head=word, max_num_seqs=4)) for word in ("auto", "w8")
    )
    assert (wide.config.lm_head, narrow.config.lm_head) == ("w16", "w8")
    exact, near = score(wide, ids), score(narrow, ids)
    assert 0 < float((exact - near).abs().max()) < 0.03 * float(exact.abs().max())
    assert narrow.plan.weight_bytes == weight_bytes(narrow.spec, narrow.config.precision, "float32", "w8")
    assert narrow.plan.weight_bytes < wide.plan.weight_bytes
    assert greedy(narrow, [ids[:40]], 1)[0] == [int(near[39].argmax())]


def test_logits_are_not_rounded_to_a_16_bit_model(tmp_path: Path) -> None:
    """In bf16 most of two near logits would be equal."""
    path = tiny_model(tmp_path / "m", **SHAPES["gqa"])  # type: ignore[arg-type]
    ids = list(range(60))
    for word in ("w16", "w8"):
        logits = score(build(path, Options(precision="w8a8kv8", dtype="bfloat16", lm_head=word, max_num_seqs=4)), ids)
        assert logits.dtype == torch.float32
        assert not torch.equal(logits, logits.bfloat16().float())
