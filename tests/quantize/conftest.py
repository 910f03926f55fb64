"""What the tests of the quantizer share: tiny models of every family, random calibration, small recipes."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from omniserve.formats.checkpoint import open_checkpoint
from omniserve.models.families import family
from omniserve.quantize.calibration import Calibration
from omniserve.quantize.recipe import Recipe, Samples, default
from tests.tiny import tiny_model

EXPERTS: dict[str, object] = {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 48}
SHAPES: dict[str, dict[str, object]] = {
    "mha-untied": {"kv_heads": 4, "tied": False},
    "gqa": {},
    "d64": {"head_dim": 64, "hidden": 192, "heads": 3, "kv_heads": 1},
    "d80": {"head_dim": 80, "heads": 2, "kv_heads": 2},
    "d96": {"head_dim": 96, "heads": 2, "kv_heads": 1},
    "d128": {"head_dim": 128, "heads": 2, "kv_heads": 1},
    "biases": {"config": {"attention_bias": True, "mlp_bias": True}},
    "no-hadamard": {"hidden": 104, "head_dim": 26, "heads": 4, "kv_heads": 2},
    "window": {"model_type": "mistral", "config": {"sliding_window": 20}},
    "mixtral": {"model_type": "mixtral", "config": {"num_local_experts": 4, "num_experts_per_tok": 2}},
    "qwen2": {"model_type": "qwen2"},
    "qwen2-moe": {
        "model_type": "qwen2_moe",
        "config": EXPERTS | {"shared_expert_intermediate_size": 80, "norm_topk_prob": False},
    },
    "qwen3": {"model_type": "qwen3", "head_dim": 32},
    "qwen3-moe": {"model_type": "qwen3_moe", "config": EXPERTS | {"norm_topk_prob": True, "mlp_only_layers": [0]}},
}
"""Tiny models: MHA, GQA, biases, q and k norms, tied and untied heads, experts, head sizes of all kinds."""


@pytest.fixture(params=sorted(SHAPES))
def any_model(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A tiny model of each family and shape."""
    return tiny_model(tmp_path / "model", **SHAPES[request.param])  # type: ignore[arg-type]


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    return tiny_model(tmp_path / "model")


def calibration(model: Path, *, samples: int = 3, length: int = 40, seed: int = 0, position: int = 0) -> Calibration:
    """Random tokens."""
    source = open_checkpoint(model)
    vocab = family(source.config).spec(source.config).vocab
    ids = torch.randint(0, vocab, (samples, length), generator=torch.Generator().manual_seed(seed)).tolist()
    return Calibration(
        ids=tuple(tuple(sample) for sample in ids), positions=tuple([position] * samples), origin="random tokens"
    )


def small(name: str) -> Recipe:
    """A default recipe for few tokens."""
    return replace(default(name), calibration=Samples(samples=3, length=40))


RECIPES = ("w4a8kv4-g128", "w4a8kv4-row", "w8a8kv8")
