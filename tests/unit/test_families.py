"""Families: numbers of a config, each mistake named; tensors missing, surplus and misshapen."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch

import omniserve.models.families as families
from omniserve.base.errors import CheckpointError
from omniserve.base.spec import ModelSpec, RopeSpec
from omniserve.formats.checkpoint import open_checkpoint
from omniserve.models.families import FAMILIES, check_tensors, expected, family
from tests.tiny import tiny_model

CONFIG: dict[str, object] = {
    "model_type": "llama",
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 160,
    "vocab_size": 97,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
}


def spec_of(**changes: object) -> ModelSpec:
    config = {key: value for key, value in (CONFIG | changes).items() if value != "absent"}
    return family(config).spec(config)


def test_defaults() -> None:
    spec = spec_of(num_key_value_heads="absent")
    assert spec == ModelSpec(
        family="llama", layers=2, hidden=64, heads=4, kv_heads=4, head_dim=16, ffn=160, vocab=97, context=512,
        norm_eps=1e-5, rope=RopeSpec(base=10000.0),
    )  # fmt: skip
    assert spec_of(head_dim=None, num_key_value_heads=None, rope_scaling=None) == spec
    biased = spec_of(attention_bias=True, mlp_bias=True, tie_word_embeddings=True, head_dim=32)
    assert (biased.qkv_bias, biased.out_bias, biased.mlp_bias, biased.tied, biased.head_dim) == (True,) * 4 + (32,)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_size": "absent"}, "config: hidden_size is missing"),
        ({"hidden_size": 0}, "config: hidden_size=0: must be a whole number from 1 to 1048576"),
        ({"hidden_size": 64.0}, "config: hidden_size=64.0: must be a whole number"),
        ({"hidden_size": True}, "config: hidden_size=True: must be a whole number"),
        ({"hidden_size": "64"}, "config: hidden_size='64': must be a whole number"),
        ({"hidden_size": [64] * 1000}, "config: hidden_size=1000 values: must be a whole number"),
        ({"hidden_size": 66}, "config: hidden_size=66: must be a multiple of num_attention_heads=4"),
        (
            {"num_hidden_layers": 10**12},
            "config: num_hidden_layers=1000000000000: must be a whole number from 1 to 1024",
        ),
        ({"num_hidden_layers": -1}, "config: num_hidden_layers=-1"),
        ({"num_key_value_heads": 3}, "config: num_key_value_heads=3: must be a divisor of num_attention_heads=4"),
        ({"head_dim": 15}, "config: head_dim=15: must be even"),
        ({"vocab_size": 10**400}, "config: vocab_size=1000"),
        ({"rms_norm_eps": 0}, "config: rms_norm_eps=0: must be a finite number above 0 and at most 1"),
        ({"rms_norm_eps": float("inf")}, "config: rms_norm_eps=inf"),
        ({"rms_norm_eps": 10**400}, "config: rms_norm_eps=1000"),
        ({"rms_norm_eps": "absent"}, "config: rms_norm_eps is missing"),
        ({"hidden_act": "gelu"}, "config: hidden_act='gelu': must be silu"),
        ({"tie_word_embeddings": "yes"}, "config: tie_word_embeddings='yes': must be true or false"),
        ({"rope_theta": -1.0}, "config: rope_theta=-1.0: must be a finite number above 1"),
        ({"rope_scaling": "linear"}, "config: rope_scaling='linear': must be an object"),
        (
            {"rope_scaling": {"type": "longrope"}},
            "config: rope_type='longrope': must be one of default, linear, dynamic",
        ),
        ({"rope_scaling": {"type": []}}, "config: rope_type=0 values: must be one of"),
        ({"rope_scaling": {"type": "linear"}}, "config: factor is missing"),
        ({"rope_scaling": {"type": "linear", "factor": 0}}, "config: factor=0: must be a finite number above 0"),
        ({"rope_scaling": {"type": "linear", "factor": 2, "long_factor": [1]}}, "rope_scaling='long_factor': must be"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "config: low_freq_factor is missing"),
        (
            {"rope_scaling": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 4, "high_freq_factor": 1}},
            "config: high_freq_factor=1: must be a finite number above 4",
        ),
        ({"rope_scaling": {"type": "yarn", "factor": 4, "truncate": False}}, "config: truncate=False: must be true"),
        ({"partial_rotary_factor": 0.5}, "must be 1, heads are rotated whole"),
        (
            {"model_type": "lama"},
            "config: model_type='lama': must be one of llama, mistral, mixtral",
        ),
        ({"model_type": None}, "config: model_type=None: must be one of"),
        ({"model_type": "mistral", "sliding_window": 0}, "config: sliding_window=0: must be a whole number from 1"),
        (
            {"model_type": "qwen2", "use_sliding_window": True, "max_window_layers": -1},
            "config: max_window_layers=-1: must be a whole number, 0 or more",
        ),
        (
            {"model_type": "qwen3", "use_sliding_window": True, "layer_types": ["full_attention"]},
            "config: layer_types=1 values: must be 2 times sliding_attention or full_attention",
        ),
        (
            {"model_type": "mixtral", "num_local_experts": 2, "num_experts_per_tok": 3},
            "config: num_experts_per_tok=3: must be at most num_local_experts=2",
        ),
        (
            {
                "model_type": "qwen3_moe",
                "num_experts": 4,
                "num_experts_per_tok": 2,
                "moe_intermediate_size": 8,
                "mlp_only_layers": ["0"],
            },
            "config: mlp_only_layers=1 values: must be a list of layer numbers",
        ),
    ],
)
def test_mistakes_are_named(changes: dict[str, object], message: str) -> None:
    with pytest.raises(CheckpointError, match=re.escape(message)) as caught:
        spec_of(**changes)
    assert len(str(caught.value)) < 250


ROPES: dict[str, tuple[dict[str, object], RopeSpec]] = {
    "default": ({"rope_type": "default"}, RopeSpec(base=5e5)),
    "linear": ({"rope_type": "linear", "factor": 2.0}, RopeSpec(kind="linear", base=5e5, factor=2.0)),
    "dynamic": (
        {"rope_type": "dynamic", "factor": 2.0},
        RopeSpec(kind="dynamic", base=5e5, factor=2.0, original_context=512),
    ),
    "llama3": (
        {
            "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 128,
        },
        RopeSpec(
            kind="llama3", base=5e5, factor=8.0, original_context=128, low_frequency_factor=1.0,
            high_frequency_factor=4.0,
        ),
    ),
    "yarn": (
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128, "beta_fast": 16.0},
        RopeSpec(kind="yarn", base=5e5, factor=4.0, original_context=128, beta_fast=16.0),
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", ROPES)
def test_rope_in_old_and_new_spelling(kind: str) -> None:
    scaling, rope = ROPES[kind]
    assert spec_of(rope_theta=5e5, rope_scaling=scaling).rope == rope
    assert spec_of(rope_parameters={**scaling, "rope_theta": 5e5}).rope == rope
    old = {"type" if key == "rope_type" else key: value for key, value in scaling.items()}
    assert spec_of(rope_theta=5e5, rope_scaling=old).rope == rope


@pytest.mark.parametrize("kind", ROPES)
def test_configs_that_transformers_writes(kind: str, tmp_path: Path) -> None:
    import json

    from transformers import LlamaConfig

    scaling, rope = ROPES[kind]
    numbers: dict[str, Any] = {key: value for key, value in CONFIG.items() if key != "model_type"}
    LlamaConfig(**numbers, rope_parameters={**scaling, "rope_theta": 5e5}).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    spec = family(config).spec(config)
    assert spec.rope == rope
    assert (spec.hidden, spec.layers, spec.kv_heads, spec.head_dim) == (64, 2, 2, 16)


def test_yarn_magnitude_from_mscale() -> None:
    scaling = {"rope_type": "yarn", "factor": 40.0, "mscale": 0.707, "mscale_all_dim": 1.0}
    rope = spec_of(rope_scaling=scaling).rope
    log = torch.tensor(40.0, dtype=torch.float64).log().item()
    assert rope.attention_factor == pytest.approx((0.0707 * log + 1) / (0.1 * log + 1))
    assert rope.original_context == 512
    assert spec_of(rope_scaling=scaling | {"attention_factor": 1.5}).rope.attention_factor == 1.5


def test_relatives() -> None:
    qwen = spec_of(model_type="qwen2", use_sliding_window=False, sliding_window=64)
    assert (qwen.family, qwen.qkv_bias, qwen.out_bias) == ("qwen2", True, False)
    mistral = spec_of(model_type="mistral", sliding_window=None)
    assert (mistral.family, mistral.qkv_bias) == ("mistral", False)
    assert spec_of(model_type="mistral", sliding_window=512).context == 512


def test_expected_tensors_are_transformers(tmp_path: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

    numbers: dict[str, Any] = {key: value for key, value in CONFIG.items() if key != "model_type"}
    for tied in (False, True):
        models: list[Any] = [
            LlamaForCausalLM(LlamaConfig(**numbers, tie_word_embeddings=tied, attention_bias=True, mlp_bias=tied)),
            Qwen2ForCausalLM(Qwen2Config(**numbers, tie_word_embeddings=tied)),
        ]
        for model in models:
            model.save_pretrained(tmp_path)
            source = open_checkpoint(tmp_path)
            spec = family(source.config).spec(source.config)
            check_tensors(source, spec)
            assert expected(spec) == {name: source.shape(name) for name in source.names()}


def test_every_file_is_in_the_table() -> None:
    folder = Path(families.__file__).parent
    files = {path.stem for path in folder.glob("*.py")} - {"__init__"}
    assert {entry.spec.__module__.rpartition(".")[2] for entry in FAMILIES.values()} == files


def check(folder: Path) -> None:
    source = open_checkpoint(folder)
    check_tensors(source, family(source.config).spec(source.config))


def test_tensors_that_fit(tmp_path: Path) -> None:
    check(tiny_model(tmp_path / "tied"))
    check(tiny_model(tmp_path / "untied", tied=False))
    harmless = {
        "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8),
        "model.layers.1.self_attn.kv_scale_quant_orig": torch.ones(2),
        "lm_head.weight": torch.ones(97, 64),
    }
    check(tiny_model(tmp_path / "harmless", extra=harmless))


def layer(index: int, name: str) -> str:
    return f"model.layers.{index}.{name}"


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"claims": {"num_hidden_layers": 3}}, "9 tensors ('model.layers.2.input_layernorm.weight', "),
        ({"layers": 3, "claims": {"num_hidden_layers": 2}}, "...) are no part of a llama model"),
        ({"claims": {"tie_word_embeddings": False}}, "tensor 'lm_head.weight' is missing"),
        ({"claims": {"attention_bias": True}}, "8 tensors ("),
        ({"extra": {"odd": torch.ones(1)}}, "tensor 'odd' is no part of a llama model"),
        ({"claims": {"vocab_size": 98}}, "has shape [97, 64], the config calls for [98, 64]"),
        ({"claims": {"num_key_value_heads": 4}}, "k_proj.weight' has shape [32, 64], the config calls for [64, 64]"),
        ({"extra": {"lm_head.weight": torch.ones(9, 64)}}, "tensor 'lm_head.weight' has shape [9, 64]"),
        (
            {"extra": {"lm_head.weight": torch.ones(97, 64, dtype=torch.int8)}},
            "tensor 'lm_head.weight' is torch.int8, a dense weight must be F32, F16 or BF16",
        ),
        ({"claims": {"quantization_config": {"quant_method": "gptq"}}}, "quantized by 'gptq', this version reads"),
    ],
)
def test_tensors_that_do_not_fit(tmp_path: Path, keywords: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=re.escape(message)):
        check(tiny_model(tmp_path / "m", **keywords))


def test_experts_beyond_any_model_are_refused_before_they_are_listed() -> None:
    config = {
        "model_type": "qwen3_moe", "hidden_size": 64, "num_hidden_layers": 1024, "num_attention_heads": 4,
        "head_dim": 16, "intermediate_size": 160, "vocab_size": 97, "max_position_embeddings": 512,
        "rms_norm_eps": 1e-5, "num_experts": 4096, "num_experts_per_tok": 2, "moe_intermediate_size": 8,
    }  # fmt: skip
    with pytest.raises(CheckpointError, match="num_experts=4096: must be at most 131072 in all 1024 layers"):
        expected(family(config).spec(config))
