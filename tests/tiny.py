"""Tiny random models on disk, made without transformers: quick to build, of any family and shape."""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

from omniserve.models.families import expected, family

ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "mixtral": "MixtralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen2_moe": "Qwen2MoeForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "qwen3_moe": "Qwen3MoeForCausalLM",
}


def tiny_model(
    folder: Path,
    model_type: str = "llama",
    *,
    seed: int = 0,
    hidden: int = 64,
    layers: int = 2,
    heads: int = 4,
    kv_heads: int = 2,
    head_dim: int = 16,
    ffn: int = 160,
    vocab: int = 97,
    context: int = 512,
    tied: bool = True,
    extra: dict[str, torch.Tensor] | None = None,
    config: dict[str, object] | None = None,
    claims: dict[str, object] | None = None,
) -> Path:
    """Write config.json and model.safetensors of a random model and return the folder.

    extra   tensors beside the model's; config: keys that are added to config.json, or win over those here
    claims  keys of config.json that the tensors do not follow
    """
    described: dict[str, object] = {
        "architectures": [ARCHITECTURES[model_type]],
        "model_type": model_type,
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "intermediate_size": ffn,
        "vocab_size": vocab,
        "max_position_embeddings": context,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "tie_word_embeddings": tied,
        "hidden_act": "silu",
        "torch_dtype": "float32",
        "bos_token_id": 1,
        "eos_token_id": 2,
    } | (config or {})
    generator = torch.Generator().manual_seed(seed)

    def draw(name: str, shape: tuple[int, ...]) -> torch.Tensor:
        values = torch.randn(shape, generator=generator)
        if name.endswith("norm.weight"):
            return 1 + 0.2 * values
        if name.endswith(".bias"):
            return 0.3 * values
        if name == "model.embed_tokens.weight":
            return values
        return values * shape[1] ** -0.5 * (2 if name.endswith(("q_proj.weight", "k_proj.weight")) else 1)

    spec = family(described).spec(described)
    tensors = {name: draw(name, shape) for name, shape in expected(spec).items()}
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors | (extra or {}), folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(described | (claims or {})))
    return folder
