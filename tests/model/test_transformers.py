"""Logits and greedy tokens against transformers on the same weights, through the served path."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from omniserve.base.config import Options
from omniserve.base.types import Request, SamplingParams
from omniserve.engine.build import Built, build
from omniserve.formats.checkpoint import open_checkpoint
from omniserve.text import Tokenizer
from tests.tiny import tiny_model

PROMPTS = (
    "What is the capital of France?",
    "Once upon a time, in a small village by the sea,",
    "def fibonacci(n):\n    ",
    "The three laws of thermodynamics are",
    "1, 1, 2, 3, 5, 8,",
    "Dear Sir or Madam,\n\nI am writing to",
    "La tour Eiffel est",
    "Photosynthesis is the process by which",
)


def score(built: Built, ids: list[int]) -> torch.Tensor:
    parts: list[torch.Tensor] = []
    built.engine.add(
        Request(
            id="score",
            tokens=list(ids),
            prompt=len(ids),
            sampling=SamplingParams(temperature=0),
            limit=0,
            reduce=lambda positions, logits: parts.append(logits.clone()),
        )
    )
    while built.engine.has_work:
        built.engine.step()
    return torch.cat(parts)


def greedy(built: Built, prompts: list[list[int]], count: int) -> list[list[int]]:
    produced: dict[str, list[int]] = {}
    for number, ids in enumerate(prompts):
        produced[str(number)] = []
        built.engine.add(
            Request(
                id=str(number),
                tokens=list(ids),
                prompt=len(ids),
                sampling=SamplingParams(temperature=0),
                limit=count,
            )
        )
    while built.engine.has_work:
        for output in built.engine.step():
            produced[output.request] += output.new_tokens
    return list(produced.values())


def peer_greedy(model: torch.nn.Module, prompts: list[list[int]], count: int) -> list[list[int]]:
    """What transformers produces greedily, its end-of-sequence rule off as in `greedy`."""
    model.generation_config.eos_token_id = None  # type: ignore[union-attr]  # from_pretrained returns a generation model
    return [
        model.generate(  # type: ignore[operator]  # likewise
            torch.tensor([prompt]), max_new_tokens=count, do_sample=False, pad_token_id=0
        )[0, len(prompt) :].tolist()
        for prompt in prompts
    ]


def exact(path: Path, **options: object) -> Built:
    return build(path, Options(precision="w16a16kv32", dtype="float32", **options))  # type: ignore[arg-type]


EXPERTS: dict[str, object] = {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 48}
SHAPES: dict[str, dict[str, object]] = {
    "gqa": {},
    "mha-untied": {"kv_heads": 4, "tied": False},
    "mqa": {"kv_heads": 1, "heads": 6, "hidden": 96},
    "wide-heads": {"head_dim": 64, "hidden": 192, "heads": 3, "kv_heads": 1},
    "d128": {"head_dim": 128, "heads": 2, "kv_heads": 1},
    "d80": {"head_dim": 80, "heads": 2, "kv_heads": 2},
    "llama3-rope": {
        "config": {
            "rope_theta": 500000.0,
            "rope_scaling": {
                "rope_type": "llama3",
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 64,
            },
        }
    },
    "yarn-rope": {
        "config": {
            "rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128},
        }
    },
    "dynamic-rope": {"config": {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}},
    "biases": {"config": {"attention_bias": True, "mlp_bias": True}},
    "d96": {"head_dim": 96, "heads": 2, "kv_heads": 1},
    "d256": {"head_dim": 256, "heads": 2, "kv_heads": 1},
    "group-7": {"hidden": 112, "heads": 7, "kv_heads": 1},
    "mistral": {"model_type": "mistral"},
    "mistral-window": {"model_type": "mistral", "config": {"sliding_window": 70}},
    "mixtral": {"model_type": "mixtral", "config": {"num_local_experts": 4, "num_experts_per_tok": 2}},
    "qwen2": {"model_type": "qwen2"},
    "qwen2-window": {
        "model_type": "qwen2",
        "config": {"use_sliding_window": True, "sliding_window": 50, "max_window_layers": 1},
    },
    "qwen2-moe": {
        "model_type": "qwen2_moe",
        "config": EXPERTS | {"shared_expert_intermediate_size": 80, "norm_topk_prob": False},
    },
    "qwen3": {"model_type": "qwen3", "head_dim": 32},
    "qwen3-moe": {
        "model_type": "qwen3_moe",
        "config": EXPERTS | {"norm_topk_prob": True, "mlp_only_layers": [0]},
    },
    "linear-rope": {"config": {"rope_scaling": {"rope_type": "linear", "factor": 4.0}}},
}


@pytest.mark.parametrize("name", sorted(SHAPES))
def test_tiny_logits_equal_transformers(name: str, tmp_path: Path) -> None:
    path = tiny_model(tmp_path / "m", **SHAPES[name])  # type: ignore[arg-type]
    theirs = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, attn_implementation="eager")
    built = exact(path, max_num_batched_tokens=100, max_num_seqs=4)
    ids = torch.randint(0, 97, (300,), generator=torch.Generator().manual_seed(5)).tolist()
    with torch.no_grad():
        wanted = theirs(torch.tensor([ids])).logits[0]
    assert (score(built, ids) - wanted).abs().max() < 1e-3
    prompts = [ids[:n] for n in (1, 63, 64, 65, 200)]
    ours = greedy(built, prompts, 24)
    assert ours == peer_greedy(theirs, prompts, 24)


@pytest.fixture(scope="module")
def peer(smollm2: Path) -> torch.nn.Module:
    return AutoModelForCausalLM.from_pretrained(smollm2.parent, gguf_file=smollm2.name, dtype=torch.float32)


@pytest.fixture(scope="module")
def text_ids(smollm2: Path) -> list[int]:
    """300 tokens of ordinary prose."""
    prose = (Path(__file__).parents[1] / "data" / "prose.txt").read_text()
    return Tokenizer.load(open_checkpoint(smollm2)).encode(prose)[:300]


def test_smollm2_logits_equal_transformers(smollm2: Path, peer: torch.nn.Module, text_ids: list[int]) -> None:
    with torch.no_grad():
        wanted = peer(torch.tensor([text_ids])).logits[0]
    built = exact(smollm2, max_num_batched_tokens=128, max_model_len=1024)
    assert (score(built, text_ids) - wanted).abs().max() < 1e-3
    half = build(smollm2, Options(precision="w16a16kv16", dtype="float32", max_model_len=1024))
    assert (score(half, text_ids) - wanted).abs().max() < 0.05


def test_smollm2_greedy_tokens_equal_transformers(smollm2: Path, peer: torch.nn.Module) -> None:
    tokenizer = Tokenizer.load(open_checkpoint(smollm2))
    prompts = [tokenizer.encode(prompt) for prompt in PROMPTS]
    assert greedy(exact(smollm2, max_model_len=1024), prompts, 64) == peer_greedy(peer, prompts, 64)
