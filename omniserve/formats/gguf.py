"""GGUF files as checkpoints: Hugging Face names and config keys, tensors de-quantized one at a time.

Source: llama.cpp's convert_hf_to_gguf.py, which writes these files, and its src/llama-model.cpp, which reads them.
"""

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from omniserve.base import log
from omniserve.base.errors import CheckpointError
from omniserve.formats.gguf_header import MAX_ENTRIES, TensorInfo, read_header, shown, tensor_types

if TYPE_CHECKING:
    import torch
    from torch import Tensor

__all__ = ["GGUFSource", "shown"]

_LOG = log.get(__name__)
_CHUNK_ELEMENTS = 1 << 18
"""Elements that are de-quantized at once: the package's temporary arrays are up to 40 times as large."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Architecture:
    """One `general.architecture`: what Hugging Face calls it, and how its files differ from the others.

    dense      model type if layers have one feed-forward part, None if there is no such model
    mixed      model type if layers have experts
    permuted   rows of q and k are stored for a rotation of neighbouring dims
    normalize  the weights of the chosen experts are scaled to sum 1, unless the file says otherwise
    """

    dense: str | None = None
    mixed: str | None = None
    permuted: bool = False
    normalize: bool = True


ARCHITECTURES = {
    "llama": _Architecture(dense="llama", mixed="mixtral", permuted=True),
    "qwen2": _Architecture(dense="qwen2"),
    "qwen2moe": _Architecture(mixed="qwen2_moe", normalize=False),
    "qwen3": _Architecture(dense="qwen3"),
    "qwen3moe": _Architecture(mixed="qwen3_moe"),
}
_CLASSES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "mixtral": "MixtralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen2_moe": "Qwen2MoeForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "qwen3_moe": "Qwen3MoeForCausalLM",
}

_OUTER = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "ffn_gate_shexp": "mlp.shared_expert.gate_proj",
    "ffn_up_shexp": "mlp.shared_expert.up_proj",
    "ffn_down_shexp": "mlp.shared_expert.down_proj",
}
_ROUTER, _SHARED_GATE = "ffn_gate_inp", "ffn_gate_inp_shexp"
_EXPERTS = {
    "mixtral": ("block_sparse_moe.gate", "block_sparse_moe.experts", {"gate": "w1", "up": "w3", "down": "w2"}),
    "": ("mlp.gate", "mlp.experts", {"gate": "gate_proj", "up": "up_proj", "down": "down_proj"}),
}
"""Router, prefix of the experts and their linears; "" is every model type that is not named."""
_LAYER_NAME = re.compile(r"blk\.(0|[1-9]\d*)\.(\w+)\.(weight|bias)")
_MERGED = re.compile(r"blk\.(0|[1-9]\d*)\.ffn_(gate|up|down)_exps\.weight")
_SINGLE = re.compile(r"blk\.(0|[1-9]\d*)\.ffn_(gate|up|down)\.(0|[1-9]\d*)\.weight")
"""Experts: all of a layer in one tensor [E, N, K]; or, in the oldest files, each one alone."""
_ROPE_FREQS = "rope_freqs.weight"
_F32 = 0

_READ = {
    "block_count", "context_length", "embedding_length", "feed_forward_length", "vocab_size",
    "attention.head_count", "attention.head_count_kv", "attention.key_length", "attention.value_length",
    "attention.layer_norm_rms_epsilon", "attention.sliding_window", "rope.dimension_count", "rope.freq_base",
    "rope.scale_linear", "rope.scaling.type", "rope.scaling.factor", "rope.scaling.original_context_length",
    "rope.scaling.finetuned", "rope.scaling.attn_factor", "rope.scaling.yarn_attn_factor",
    "rope.scaling.yarn_beta_fast", "rope.scaling.yarn_beta_slow", "expert_count", "expert_used_count",
    "expert_feed_forward_length", "expert_shared_feed_forward_length", "expert_weights_norm",
}  # fmt: skip
_NEUTRAL: dict[str, tuple[object, ...]] = {
    "attention.causal": (True,),
    "attention.scale": (0.0,),
    "attention.clamp_kqv": (0.0,),
    "attention.max_alibi_bias": (0.0,),
    "attn_logit_softcapping": (0.0,),
    "expert_gating_func": (0, 1),
    "expert_group_count": (0, 1),
    "expert_group_used_count": (0, 1),
    "expert_weights_scale": (0.0, 1.0),
    "final_logit_softcapping": (0.0,),
    "interleave_moe_layer_step": (0, 1),
    "leading_dense_block_count": (0,),
    "logit_scale": (0.0, 1.0),
    "moe_every_n_layers": (0, 1),
    "residual_scale": (0.0, 1.0),
    "embedding_scale": (0.0, 1.0),
    "use_parallel_residual": (False,),
    "rope.scaling.alpha": (0.0, 1.0),
    "rope.scaling.yarn_log_multiplier": (0.0,),
    "rope.scaling.yarn_ext_factor": (1.0, -1.0),
}
"""Keys that change what is computed in a way the decoder does not know; only these values leave it unchanged."""


class GGUFSource:
    """A GGUF file as a checkpoint: Hugging Face names and config keys, de-quantized fp32 tensors.

    The file stays mapped; `tensor` copies what it returns, and nothing else is held. Rows of q and k of architecture
    `llama`, which its files store in the order of neighbouring rotated dims, come back in Hugging Face's order; the
    experts of a layer, which are one tensor in the file, come back one by one. torch is imported for tensors only.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._metadata, tensors, self._data = read_header(self.path)
        name = self._metadata.get("general.architecture")
        if not isinstance(name, str) or name not in ARCHITECTURES:
            raise self._fail(
                f"general.architecture is {shown(name)}, this version reads {', '.join(sorted(ARCHITECTURES))}"
            )
        if shown(parts := self._metadata.get("split.count", 0)) not in ("0", "1"):
            raise self._fail(f"one of {shown(parts)} files of a model: join them with `llama-gguf-split --merge`")
        self._prefix = name
        self._architecture = ARCHITECTURES[name]
        self._model_type = self._find_model_type()
        freqs = tensors.pop(_ROPE_FREQS, None)
        self._tensors: dict[str, TensorInfo] = {}
        for gguf_name, info in tensors.items():
            for mapped, part in self._mapped(gguf_name, info):
                if mapped in self._tensors:
                    raise self._fail(f"tensor {mapped!r} is there twice, once as {gguf_name!r}")
                self._tensors[mapped] = part
            if len(self._tensors) > MAX_ENTRIES:
                raise self._fail(f"more than {MAX_ENTRIES} tensors, each expert's counted")
        self._check_types()
        self._config = self._translate(freqs)

    @property
    def metadata(self) -> Mapping[str, object]:
        """All parsed key values: numbers, bools, strings, lists of strings, numpy arrays of numbers."""
        return self._metadata

    @property
    def config(self) -> Mapping[str, object]:
        """The metadata under the keys of Hugging Face's config.json."""
        return self._config

    def names(self) -> frozenset[str]:
        """Hugging Face names of all tensors; one without such a name keeps its own."""
        return frozenset(self._tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor, rows first."""
        return self._info(name).shape

    def dtype(self, name: str) -> "torch.dtype":
        """float32: tensors are de-quantized when they are read."""
        import torch

        self._info(name)
        return torch.float32

    def tensor(self, name: str) -> "Tensor":
        """Return one tensor, de-quantized to fp32 and owned by the caller.

        Raises CheckpointError if there is no such tensor.
        """
        import torch

        info = self._info(name)
        out = torch.empty(info.shape, dtype=torch.float32)
        self._dequantize(info, out.view(-1).numpy())
        if self._architecture.permuted and (match := re.search(r"self_attn\.([qk])_proj\.", name)):
            heads = self._count("attention.head_count")
            if match[1] == "k":
                heads = self._count("attention.head_count_kv", heads)
            if info.shape[0] % (2 * heads):
                raise self._fail(
                    f"tensor {name!r} has {info.shape[0]} rows, which {heads} heads of even size cannot fill"
                )
            out = out.view(heads, -1, 2, *info.shape[1:]).transpose(1, 2).reshape(info.shape)
        return out

    def _info(self, name: str) -> TensorInfo:
        if name not in self._tensors:
            raise self._fail(f"tensor {name!r} is missing")
        return self._tensors[name]

    def _fail(self, sentence: str) -> CheckpointError:
        return CheckpointError(f"{self.path}: {sentence}")

    def _dequantize(self, info: TensorInfo, out: np.ndarray) -> None:
        """Fill `out`, flat; blocks never cross the end of a row, so that rows need no attention."""
        from gguf.quants import dequantize

        kind, block, block_bytes = tensor_types()[info.type]
        raw = np.frombuffer(self._data, np.uint8, info.size, info.start)
        blocks = max(1, _CHUNK_ELEMENTS // block)
        with np.errstate(all="ignore"):
            for first in range(0, info.size // block_bytes, blocks):
                chunk = raw[first * block_bytes : (first + blocks) * block_bytes]
                out[first * block : (first + blocks) * block] = dequantize(chunk[None], kind)[0]

    def _mapped(self, name: str, info: TensorInfo) -> Iterator[tuple[str, TensorInfo]]:
        """Yield the Hugging Face names of a tensor and where each lies; a name that is not known stays."""
        router, experts, linears = _EXPERTS.get(self._model_type, _EXPERTS[""])
        if match := _MERGED.fullmatch(name):
            count, each = info.shape[0], info.size // info.shape[0]
            if len(info.shape) != 3 or count != self._count("expert_count", 0):
                raise self._fail(
                    f"tensor {name!r} has shape {list(info.shape)}, it must be [{self._prefix}.expert_count, N, K]"
                )
            for number in range(min(count, MAX_ENTRIES + 1)):
                part = TensorInfo(info.shape[1:], info.type, info.start + number * each, each)
                yield f"model.layers.{match[1]}.{experts}.{number}.{linears[match[2]]}.weight", part
        elif match := _SINGLE.fullmatch(name):
            yield f"model.layers.{match[1]}.{experts}.{match[3]}.{linears[match[2]]}.weight", info
        elif match := _LAYER_NAME.fullmatch(name):
            known = _LAYER | {_ROUTER: router, _SHARED_GATE: "mlp.shared_expert_gate"}
            if match[2] == _SHARED_GATE and len(info.shape) == 1:  # one row, which files store as a vector
                info = info._replace(shape=(1, *info.shape))
            yield f"model.layers.{match[1]}.{known[match[2]]}.{match[3]}" if match[2] in known else name, info
        else:
            stem, _, suffix = name.rpartition(".")
            yield f"{_OUTER[stem]}.{suffix}" if stem in _OUTER else name, info

    def _check_types(self) -> None:
        from gguf.quants import dequantize

        for name, info in {info.type: (name, info) for name, info in self._tensors.items()}.values():
            kind, _, block_bytes = tensor_types()[info.type]
            try:
                dequantize(np.zeros((1, block_bytes), np.uint8), kind)
            except NotImplementedError:
                raise self._fail(f"tensor {name!r} has type {kind.name}, which cannot be de-quantized") from None

    def _value(self, key: str, default: object = None) -> object:
        return self._metadata.get(f"{self._prefix}.{key}", default)

    def _required(self, key: str) -> object:
        if f"{self._prefix}.{key}" not in self._metadata:
            raise self._fail(f"metadata key {self._prefix}.{key} is missing")
        return self._value(key)

    def _count(self, key: str, default: int | None = None) -> int:
        """Return a positive whole number; `default` itself may be 0."""
        value = self._required(key) if default is None else self._value(key, default)
        if type(value) is not int or (value < 1 and value != default):
            raise self._fail(f"{self._prefix}.{key} is {shown(value)}, it must be a positive whole number")
        return value

    def _real(self, key: str, default: float | None = None) -> float:
        value = self._required(key) if default is None else self._value(key, default)
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise self._fail(f"{self._prefix}.{key} is {shown(value)}, it must be a finite number")
        return float(value)

    def _find_model_type(self) -> str:
        """Return Hugging Face's model type; llama.cpp has one architecture for Llama, Mistral and Mixtral."""
        experts = self._count("expert_count", 0)
        found = self._architecture.mixed if experts else self._architecture.dense
        if found is None:
            raise self._fail(
                f"{self._prefix}.expert_count is {experts}, which the {self._prefix} decoder of this version does not "
                "compute"
            )
        return "mistral" if found == "llama" and self._window() else found

    def _window(self) -> int:
        """Return the sliding window, 0 if every token sees all before it."""
        window = self._count("attention.sliding_window", 0)
        return window if window and window < self._count("context_length") else 0

    def _translate(self, freqs: TensorInfo | None) -> dict[str, object]:
        self._refuse_unknown()
        heads, hidden = self._count("attention.head_count"), self._count("embedding_length")
        head_dim = self._count("attention.key_length", max(hidden // heads, 1))
        for key in ("attention.value_length", "rope.dimension_count"):
            if self._count(key, head_dim) != head_dim:
                raise self._fail(
                    f"{self._prefix}.{key} is {shown(self._value(key))}, it must be the head size {head_dim}"
                )
        embedding = self._tensors.get("model.embed_tokens.weight")
        tokens = self._metadata.get("tokenizer.ggml.tokens")
        rows = embedding.shape[0] if embedding else len(tokens) if isinstance(tokens, list) else None
        biased = any(re.search(r"\.self_attn\.q_proj\.bias$", name) for name in self._tensors)
        config: dict[str, object] = {
            "model_type": self._model_type,
            "architectures": [_CLASSES[self._model_type]],
            "hidden_size": hidden,
            "num_hidden_layers": self._count("block_count"),
            "num_attention_heads": heads,
            "num_key_value_heads": self._count("attention.head_count_kv", heads),
            "head_dim": head_dim,
            "vocab_size": self._count("vocab_size", rows),
            "max_position_embeddings": self._count("context_length"),
            "rms_norm_eps": self._real("attention.layer_norm_rms_epsilon"),
            "rope_theta": self._real("rope.freq_base", 10000.0),
            "rope_scaling": self._rope_scaling(freqs, head_dim),
            "hidden_act": "silu",
            "tie_word_embeddings": "lm_head.weight" not in self._tensors,
            "attention_bias": biased,
            "qkv_bias": biased,
            "mlp_bias": any(re.search(r"\.mlp\.gate_proj\.bias$", name) for name in self._tensors),
            "torch_dtype": self._stored_dtype(),
        }
        config |= self._feed_forward()
        if window := self._window():
            if self._model_type not in ("mistral", "mixtral"):
                raise self._fail(
                    f"{self._prefix}.attention.sliding_window is {window}: of this architecture, models are read "
                    f"whose window is 0 or at least the context of {config['max_position_embeddings']}"
                )
            config["sliding_window"] = window
        for name in ("bos", "eos"):
            if (token := self._metadata.get(f"tokenizer.ggml.{name}_token_id")) is not None:
                config[f"{name}_token_id"] = token
        return config

    def _feed_forward(self) -> dict[str, object]:
        """Return the keys of the feed-forward parts; a size that old files do not tell is that of the tensors."""
        if self._model_type != self._architecture.mixed:
            return {"intermediate_size": self._count("feed_forward_length")}
        count, chosen = self._count("expert_count"), self._count("expert_used_count")
        normalize = self._value("expert_weights_norm", self._architecture.normalize)
        if not isinstance(normalize, bool):
            raise self._fail(f"{self._prefix}.expert_weights_norm is {shown(normalize)}, it must be true or false")
        _, experts, linears = _EXPERTS.get(self._model_type, _EXPERTS[""])
        inner = self._count(
            "expert_feed_forward_length", self._inner(rf"\.{re.escape(experts)}\.0\.{linears['gate']}\.weight$")
        )
        if self._model_type == "mixtral":
            if not normalize:
                raise self._fail(f"{self._prefix}.expert_weights_norm is False, Mixtral's weights are always normed")
            return {"intermediate_size": inner, "num_local_experts": count, "num_experts_per_tok": chosen}
        config: dict[str, object] = {
            "intermediate_size": self._count("feed_forward_length", inner),
            "moe_intermediate_size": inner,
            "num_experts": count,
            "num_experts_per_tok": chosen,
            "norm_topk_prob": normalize,
        }
        if self._model_type == "qwen2_moe":
            shared = self._inner(r"\.mlp\.shared_expert\.gate_proj\.weight$")
            config["shared_expert_intermediate_size"] = self._count("expert_shared_feed_forward_length", shared)
        return config

    def _inner(self, pattern: str) -> int | None:
        """Return the rows of the first tensor of that name, or None."""
        return next((info.shape[0] for name, info in self._tensors.items() if re.search(pattern, name)), None)

    def _refuse_unknown(self) -> None:
        for key, value in self._metadata.items():
            name = key.removeprefix(f"{self._prefix}.")
            if name == key or name in _READ:
                continue
            if name not in _NEUTRAL:
                _LOG.warning("gguf key without effect %s", log.fields(key=key[:80], value=shown(value)))
            elif isinstance(value, np.ndarray) or value not in _NEUTRAL[name]:
                raise self._fail(
                    f"{key} is {shown(value)}, which the {self._prefix} decoder of this version does not compute"
                )

    def _stored_dtype(self) -> str:
        kinds = {tensor_types()[info.type][0].name for info in self._tensors.values()}
        return "bfloat16" if "BF16" in kinds else "float32" if kinds == {"F32"} else "float16"

    def _rope_scaling(self, freqs: TensorInfo | None, head_dim: int) -> dict[str, object] | None:
        kind = self._value("rope.scaling.type", "none")
        if not isinstance(kind, str) or kind not in ("none", "linear", "yarn"):
            raise self._fail(f"{self._prefix}.rope.scaling.type is {shown(kind)}, allowed are none, linear and yarn")
        if freqs is not None:
            if kind != "none":
                raise self._fail(
                    f"both {_ROPE_FREQS} and rope.scaling.type={shown(kind)} are there, only one can be meant"
                )
            return self._llama3(freqs, head_dim)
        if kind == "none":
            factor = self._real("rope.scale_linear", 1.0)
            return None if factor in (0.0, 1.0) else {"rope_type": "linear", "factor": factor}
        if kind == "linear":
            return {"rope_type": "linear", "factor": self._real("rope.scaling.factor")}
        factor = self._real("rope.scaling.factor")
        scaling: dict[str, object] = {
            "rope_type": "yarn",
            "factor": factor,
            "original_max_position_embeddings": self._count("rope.scaling.original_context_length"),
            "beta_fast": self._real("rope.scaling.yarn_beta_fast", 32.0),
            "beta_slow": self._real("rope.scaling.yarn_beta_slow", 1.0),
        }
        attention = self._real("rope.scaling.attn_factor", 1.0) * self._real("rope.scaling.yarn_attn_factor", 1.0)
        if attention != 1.0:  # llama.cpp multiplies YaRN's own factor by it, Hugging Face's key replaces the product
            scaling["attention_factor"] = attention * (0.1 * math.log(max(factor, 1.0)) + 1.0)
        return scaling

    def _llama3(self, freqs: TensorInfo, head_dim: int) -> dict[str, object] | None:
        """Return the parameters whose llama3 divisors are the stored ones, which hold the divisors alone.

        All published models share the frequency factors 1 and 4 and the trained length 8192; the factor is the
        largest divisor.
        """
        if freqs.shape != (head_dim // 2,) or freqs.type != _F32:
            raise self._fail(f"tensor {_ROPE_FREQS!r} has shape {list(freqs.shape)}, it must be F32 [{head_dim // 2}]")
        stored = np.empty(head_dim // 2, np.float32)
        self._dequantize(freqs, stored)
        factor, length = float(stored.max()), 8192
        if (stored == 1).all():
            return None
        base = self._real("rope.freq_base", 10000.0)
        turns = length / (2 * math.pi * max(base, 1.0) ** (np.arange(0, head_dim, 2) / head_dim))
        smooth = np.clip((turns - 1.0) / (4.0 - 1.0), 0.0, 1.0)
        with np.errstate(all="ignore"):
            matches = np.allclose(stored, 1 / ((1 - smooth) / factor + smooth), rtol=1e-4, atol=0)
        if not matches:
            raise self._fail(f"tensor {_ROPE_FREQS!r} is not Llama 3's frequency scaling, the only one that is read")
        return {
            "rope_type": "llama3",
            "factor": factor,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": length,
        }
