"""Dummy weights: the shapes of published models, the same numbers every time, and a label wherever they show."""

import math

import pytest
import torch

from omniserve import LLM
from omniserve.base.config import SHAPES, Options
from omniserve.base.errors import CheckpointError
from omniserve.engine.build import build, open_source
from omniserve.formats.dummy import CONFIGS, DummySource
from omniserve.models.families import check_tensors, expected, family

PARAMETERS = {
    "llama-3-8b": 8_030_261_248,
    "llama-3-8b-1048k": 8_030_261_248,
    "llama-2-7b": 6_738_415_616,
    "llama-2-13b": 13_015_864_320,
    "llama-30b": 32_528_943_616,
    "llama-2-70b": 68_976_648_192,
    "mistral-7b": 7_241_732_096,
    "yi-34b": 34_388_917_248,
    "qwen1.5-72b": 72_287_920_128,
}
"""As the models' pages on huggingface.co count them."""


def source(name: str) -> DummySource:
    found = open_source(None, Options(load_format="dummy", shape=name))
    assert isinstance(found, DummySource)
    return found


def test_every_word_has_a_shape() -> None:
    assert set(CONFIGS) == set(SHAPES) == {*PARAMETERS, "tiny"}


@pytest.mark.parametrize("name", PARAMETERS)
def test_shapes_are_those_of_the_published_models(name: str) -> None:
    shapes = expected(family(CONFIGS[name]).spec(CONFIGS[name]))
    assert sum(math.prod(shape) for shape in shapes.values()) == PARAMETERS[name]


def test_the_same_tensor_every_time() -> None:
    one, other = source("tiny"), source("tiny")
    check_tensors(one, family(one.config).spec(one.config))
    seen = []
    for name in sorted(one.names()):
        tensor = one.tensor(name)
        assert (tensor.shape, tensor.dtype) == (one.shape(name), one.dtype(name))
        assert torch.equal(tensor, other.tensor(name))
        if not name.endswith("norm.weight"):
            assert float(tensor.float().std()) == pytest.approx(tensor.shape[1] ** -0.5, rel=0.05)
            assert len(torch.unique(tensor.float(), dim=0)) == len(tensor)
            seen.append(tuple(tensor.flatten()[:32].tolist()))
    assert len(set(seen)) == len(seen)
    with pytest.raises(CheckpointError, match=r"tiny \(dummy weights\): tensor 'x' is missing"):
        one.shape("x")


def test_tensors_are_made_on_the_device() -> None:
    there = DummySource("tiny", CONFIGS["tiny"], {"a.weight": (8, 4), "a_norm.weight": (4,)}, "meta")
    assert {there.tensor(name).device.type for name in there.names()} == {"meta"}


def test_a_tensor_longer_than_the_pool() -> None:
    tensor = source("llama-2-7b").tensor("model.layers.0.self_attn.q_proj.weight")
    assert tensor.shape == (4096, 4096)
    assert len(torch.unique(tensor[:, :8].float(), dim=0)) == 4096


@pytest.mark.parametrize("precision", ["w16a16kv16", "w8a8kv8", "w4a8kv4"])
def test_activations_stay_finite(precision: str) -> None:
    built = build(None, Options(load_format="dummy", shape="tiny", precision=precision))
    assert built.plan.model == "tiny (dummy weights)"
    assert built.warnings[0].startswith("tiny (dummy weights): ")


def test_deep_activations_stay_finite() -> None:
    config = {**CONFIGS["tiny"], "num_hidden_layers": 80}
    deep = DummySource("deep", config, expected(family(config).spec(config)))
    x = deep.tensor("model.embed_tokens.weight").float()[:4]
    for layer in range(80):  # the residual stream as two random maps of its norm per layer
        for name in ("self_attn.o_proj", "mlp.down_proj"):
            w = deep.tensor(f"model.layers.{layer}.{name}.weight").float()
            a = torch.nn.functional.rms_norm(x, (64,)).repeat(1, 3)[:, : w.shape[1]]
            x = x + a @ w.T
    assert x.abs().max() < 1000


def test_the_model_answers() -> None:
    llm = LLM(None, load_format="dummy", shape="tiny")  # type: ignore[arg-type]
    output = llm.generate("abc é")[0]
    assert llm.tokenizer.decode(output.prompt_token_ids) == "abc é"
    assert len(output.prompt_token_ids) == 6
    assert (len(output.outputs[0].token_ids), output.outputs[0].finish_reason) == (16, "length")
    assert "dummy weights" in llm.plan.model
