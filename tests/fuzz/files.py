"""Model files for tests: a folder of safetensors written again as GGUF, with the gguf package and its names."""

import json
import re
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from safetensors.torch import load_file

ARCHITECTURES = {
    "llama": gguf.MODEL_ARCH.LLAMA,
    "mistral": gguf.MODEL_ARCH.LLAMA,
    "mixtral": gguf.MODEL_ARCH.LLAMA,
    "qwen2": gguf.MODEL_ARCH.QWEN2,
    "qwen2_moe": gguf.MODEL_ARCH.QWEN2MOE,
    "qwen3": gguf.MODEL_ARCH.QWEN3,
    "qwen3_moe": gguf.MODEL_ARCH.QWEN3MOE,
}
WORDS: dict[str, object] = {
    "tokens": ["<|end|>", *"abcdefghijklmnopqrstuvwxyz", "ab", "cd", "abcd", *"0123456789"],
    "types": [3] + [1] * 39,
    "merges": ["a b", "c d", "ab cd"],
}


def as_gguf(folder: Path, path: Path, kind: str = "F32", *, words: bool = False, extra: Any = None) -> Path:
    """Write the model of a folder as llama.cpp's convert_hf_to_gguf.py would, matrices as type `kind`.

    words  with a tokenizer of 40 tokens
    extra  called with the writer before it writes
    """
    config = json.loads((folder / "config.json").read_text())
    architecture = ARCHITECTURES[config["model_type"]]
    writer = gguf.GGUFWriter(path, gguf.MODEL_ARCH_NAMES[architecture])
    describe(writer, config)
    if words:
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre("smollm")
        writer.add_token_list(WORDS["tokens"])
        writer.add_token_types(WORDS["types"])
        writer.add_token_merges(WORDS["merges"])
        writer.add_eos_token_id(0)
        writer.add_chat_template("{% for m in messages %}{{ m['content'] }}{% endfor %}")
    names = gguf.get_tensor_name_map(architecture, config["num_hidden_layers"])
    for name, tensor in merged(load_file(folder / "model.safetensors"), config).items():
        stem, suffix = name.rsplit(".", 1)
        stored = names.get_name(stem)
        assert stored is not None, name
        of = gguf.GGMLQuantizationType[kind if tensor.dim() > 1 and "ffn_gate_inp" not in stored else "F32"]
        raw = gguf.quants.quantize(np.ascontiguousarray(tensor.float().numpy()), of)
        writer.add_tensor(f"{stored}.{suffix}", raw, raw_dtype=of)
    if extra is not None:
        extra(writer)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def describe(writer: gguf.GGUFWriter, config: dict[str, Any]) -> None:
    """Write the numbers of a config.json."""
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_key_length(config["head_dim"])
    writer.add_value_length(config["head_dim"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(config["rope_theta"])
    writer.add_vocab_size(config["vocab_size"])
    if config.get("sliding_window"):
        writer.add_sliding_window(config["sliding_window"])
    if experts := config.get("num_local_experts", config.get("num_experts")):
        writer.add_expert_count(experts)
        writer.add_expert_used_count(config["num_experts_per_tok"])
    if "moe_intermediate_size" in config:
        writer.add_expert_feed_forward_length(config["moe_intermediate_size"])
    if "shared_expert_intermediate_size" in config:
        writer.add_expert_shared_feed_forward_length(config["shared_expert_intermediate_size"])


def merged(tensors: dict[str, torch.Tensor], config: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Return the tensors as the converter has them: q and k of Llama permuted, experts stacked, vectors flat."""
    found: dict[str, torch.Tensor] = {}
    stacks: dict[str, dict[int, torch.Tensor]] = {}
    for name, tensor in tensors.items():
        if match := re.fullmatch(r"(.*)\.(block_sparse_moe|mlp)\.experts\.(\d+)\.(\w+)\.weight", name):
            layer = match[1].removeprefix("model.") if match[2] == "block_sparse_moe" else match[1]
            part = "feed_forward" if match[2] == "block_sparse_moe" else "mlp"
            stacks.setdefault(f"{layer}.{part}.experts.{match[4]}.weight", {})[int(match[3])] = tensor
            continue
        if config["model_type"] in ("llama", "mistral", "mixtral") and (
            match := re.search(r"self_attn\.([qk])_proj", name)
        ):
            tensor = permuted(tensor, config["num_attention_heads" if match[1] == "q" else "num_key_value_heads"])
        found[name] = tensor.squeeze(0) if name.endswith("shared_expert_gate.weight") else tensor
    for name, parts in stacks.items():
        found[name] = torch.stack([parts[number] for number in range(len(parts))])
    return found


def permuted(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Return rows as llama.cpp's convert_hf_to_gguf.py stores them."""
    rows = weight.reshape(heads, 2, weight.shape[0] // heads // 2, *weight.shape[1:])
    return rows.swapaxes(1, 2).reshape(weight.shape)
