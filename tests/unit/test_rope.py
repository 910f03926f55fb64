"""Rotary tables against transformers' formulas, and the rotation against complex numbers in fp64."""

import math

import pytest
import torch
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from omniserve.base.spec import RopeSpec
from omniserve.ops.rope import make_rope, rope_frequencies, rotate

CPU = torch.device("cpu")
PARAMETERS = {
    "linear": {"factor": 4.0},
    "llama3": {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 512,
    },
    "yarn": {"factor": 4.0, "original_max_position_embeddings": 512, "beta_fast": 32.0, "beta_slow": 1.0},
    "dynamic": {"factor": 2.0, "original_max_position_embeddings": 512},
}
SPECS = {
    "linear": RopeSpec(kind="linear", base=5e5, factor=4.0),
    "llama3": RopeSpec(kind="llama3", base=5e5, factor=8.0, original_context=512),
    "yarn": RopeSpec(kind="yarn", base=5e5, factor=4.0, original_context=512),
    "dynamic": RopeSpec(kind="dynamic", base=5e5, factor=2.0, original_context=512),
}


@pytest.mark.parametrize("kind", sorted(SPECS))
def test_frequencies_equal_transformers(kind: str) -> None:
    config = LlamaConfig(
        hidden_size=128,
        num_attention_heads=2,
        head_dim=64,
        max_position_embeddings=512 if kind == "dynamic" else 2048,
        rope_parameters={"rope_type": kind, "rope_theta": 5e5, **PARAMETERS[kind]},
    )
    theirs, factor = ROPE_INIT_FUNCTIONS[kind](config, CPU, seq_len=2048)
    ours, magnitude = rope_frequencies(SPECS[kind], head_dim=64, context=2048)
    assert torch.allclose(ours, theirs.double(), rtol=2e-6)
    assert magnitude == pytest.approx(factor)


def test_dynamic_equals_default_within_the_trained_length() -> None:
    dynamic, _ = rope_frequencies(SPECS["dynamic"], head_dim=64, context=512)
    plain, _ = rope_frequencies(RopeSpec(base=5e5), head_dim=64, context=512)
    assert torch.equal(dynamic, plain)


@pytest.mark.parametrize("position", [0, 1, 100_000, 262_143, 1_000_000])
def test_rotation_equals_complex_multiplication_in_fp64(position: int) -> None:
    head_dim = 128
    rope = make_rope(RopeSpec(base=5e5), head_dim=head_dim, context=position + 1, device=CPU)
    x = torch.randn(1, 3, head_dim, generator=torch.Generator().manual_seed(position))
    angle = position * torch.tensor([5e5 ** (-2 * j / head_dim) for j in range(head_dim // 2)], dtype=torch.float64)
    pairs = torch.complex(x[..., : head_dim // 2].double(), x[..., head_dim // 2 :].double())
    turned = pairs * torch.polar(torch.ones_like(angle), angle)
    truth = torch.cat([turned.real, turned.imag], -1)
    assert (rotate(x, torch.tensor([position]), rope).double() - truth).abs().max() < 2e-6


def test_yarn_magnitude() -> None:
    _, magnitude = rope_frequencies(SPECS["yarn"], head_dim=64, context=2048)
    assert magnitude == pytest.approx(0.1 * math.log(4) + 1)
