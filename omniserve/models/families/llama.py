"""Llama: the numbers of its config.json, checked one by one, and the tensors they call for."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import get_args

from omniserve.base.errors import CheckpointError
from omniserve.base.spec import Experts, ModelSpec, RopeKind, RopeSpec

Config = Mapping[str, object]

_LARGEST = {
    "num_hidden_layers": 1 << 10,
    "num_attention_heads": 1 << 12,
    "num_key_value_heads": 1 << 12,
    "head_dim": 1 << 12,
    "hidden_size": 1 << 20,
    "intermediate_size": 1 << 22,
    "vocab_size": 1 << 24,
    "max_position_embeddings": 1 << 28,
    "original_max_position_embeddings": 1 << 28,
    "sliding_window": 1 << 28,
    "num_local_experts": 1 << 12,
    "num_experts": 1 << 12,
    "num_experts_per_tok": 1 << 12,
    "moe_intermediate_size": 1 << 22,
    "shared_expert_intermediate_size": 1 << 22,
    "decoder_sparse_step": 1 << 10,
}
"""Far beyond any model: a config that asks for more is corrupt, and must not make anybody allocate."""
_MOST_EXPERTS = 1 << 17
"""The same for the experts of all layers together; a name and a shape are held for each."""
_ROPE_KEYS: dict[RopeKind, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    "dynamic": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    "yarn": (
        "factor", "original_max_position_embeddings", "attention_factor", "beta_fast", "beta_slow", "mscale",
        "mscale_all_dim", "truncate", "finetuned",
    ),
}  # fmt: skip
_ROPE_COMMON = ("rope_type", "type", "rope_theta", "partial_rotary_factor", "max_position_embeddings")


def spec(config: Config) -> ModelSpec:
    """Return the numbers of a config of model type llama.

    Raises CheckpointError naming the key, what was given and what is allowed.
    """
    return decoder_spec(config, "llama")


def decoder_spec(config: Config, family: str) -> ModelSpec:
    """Return the numbers of a Llama-like decoder under the name of its family."""
    activation = config.get("hidden_act", "silu")
    if activation not in ("silu", "swish"):
        raise refuse("hidden_act", activation, "silu, the only activation of this version")
    heads = whole(config, "num_attention_heads")
    kv_heads = whole(config, "num_key_value_heads", heads)
    if heads % kv_heads:
        raise refuse("num_key_value_heads", kv_heads, f"a divisor of num_attention_heads={heads}")
    hidden = whole(config, "hidden_size")
    if config.get("head_dim") is None and hidden % heads:
        raise refuse("hidden_size", hidden, f"a multiple of num_attention_heads={heads}, or head_dim given")
    head_dim = whole(config, "head_dim", hidden // heads)
    if head_dim % 2:
        raise refuse("head_dim", head_dim, "even, because rotation pairs its dimensions")
    context = whole(config, "max_position_embeddings")
    attention_bias = truth(config, "attention_bias")
    return ModelSpec(
        family=family,
        layers=whole(config, "num_hidden_layers"),
        hidden=hidden,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        ffn=whole(config, "intermediate_size"),
        vocab=whole(config, "vocab_size"),
        context=context,
        norm_eps=real(config, "rms_norm_eps", above=0.0, most=1.0),
        rope=rope_spec(config, context),
        tied=truth(config, "tie_word_embeddings"),
        qkv_bias=attention_bias,
        out_bias=attention_bias,
        mlp_bias=truth(config, "mlp_bias"),
    )


def rope_spec(config: Config, context: int) -> RopeSpec:
    """Return the rotation: `rope_parameters` (transformers 5), else `rope_theta` and `rope_scaling`.

    Source: transformers' modeling_rope_utils, whose defaults these are.
    """
    scaling: object = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if not isinstance(scaling, Mapping):
        raise refuse("rope_scaling", scaling, "an object")
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    if kind not in get_args(RopeKind):
        raise refuse("rope_type", kind, f"one of {', '.join(get_args(RopeKind))}")
    if surplus := sorted(set(scaling) - set(_ROPE_KEYS[kind]) - set(_ROPE_COMMON)):
        raise refuse("rope_scaling", surplus[0], f"without keys that {kind} does not know")
    if real(scaling, "partial_rotary_factor", real(config, "partial_rotary_factor", 1.0)) != 1.0:
        raise refuse("partial_rotary_factor", scaling.get("partial_rotary_factor"), "1, heads are rotated whole")
    base = real(scaling, "rope_theta", real(config, "rope_theta", 10000.0, above=1.0), above=1.0)
    if kind == "default":
        return RopeSpec(base=base)
    factor = real(scaling, "factor", above=0.0)
    if kind == "linear":
        return RopeSpec(kind="linear", base=base, factor=factor)
    if kind == "dynamic":
        return RopeSpec(kind="dynamic", base=base, factor=factor, original_context=context)
    given = config.get("original_max_position_embeddings")
    origin = scaling if given is None else config  # the outer one wins, as in transformers
    original = whole(origin, "original_max_position_embeddings", context)
    if kind == "llama3":
        low = real(scaling, "low_freq_factor", above=0.0)
        high = real(scaling, "high_freq_factor", above=low)
        return RopeSpec(
            kind="llama3",
            base=base,
            factor=factor,
            original_context=original,
            low_frequency_factor=low,
            high_frequency_factor=high,
        )
    if scaling.get("truncate", True) is not True:
        raise refuse("truncate", scaling.get("truncate"), "true")
    return RopeSpec(
        kind="yarn",
        base=base,
        factor=factor,
        original_context=original,
        beta_fast=real(scaling, "beta_fast", 32.0, above=0.0),
        beta_slow=real(scaling, "beta_slow", 1.0, above=0.0),
        attention_factor=_attention_factor(scaling, factor),
    )


def _attention_factor(scaling: Config, factor: float) -> float | None:
    """Return YaRN's magnitude if the config sets one, by itself or through the two mscale values."""
    if scaling.get("attention_factor") is not None:
        return real(scaling, "attention_factor", above=0.0)
    if not scaling.get("mscale") or not scaling.get("mscale_all_dim"):
        return None
    growth = 0.1 * math.log(max(factor, 1.0))
    return (real(scaling, "mscale") * growth + 1.0) / (real(scaling, "mscale_all_dim", above=0.0) * growth + 1.0)


def expected(spec: ModelSpec) -> dict[str, tuple[int, ...]]:
    """Return the name and shape of every tensor of the decoder, in Hugging Face's names."""
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (spec.vocab, spec.hidden)}
    q, kv = spec.heads * spec.head_dim, spec.kv_heads * spec.head_dim
    linears = {
        "self_attn.q_proj": (q, spec.hidden, spec.qkv_bias),
        "self_attn.k_proj": (kv, spec.hidden, spec.qkv_bias),
        "self_attn.v_proj": (kv, spec.hidden, spec.qkv_bias),
        "self_attn.o_proj": (spec.hidden, q, spec.out_bias),
        "mlp.gate_proj": (spec.ffn, spec.hidden, spec.mlp_bias),
        "mlp.up_proj": (spec.ffn, spec.hidden, spec.mlp_bias),
        "mlp.down_proj": (spec.hidden, spec.ffn, spec.mlp_bias),
    }
    experts = spec.experts
    if experts is not None and experts.count * len(experts.layers) > _MOST_EXPERTS:
        raise refuse("num_experts", experts.count, f"at most {_MOST_EXPERTS} in all {len(experts.layers)} layers")
    for layer in range(spec.layers):
        prefix = f"model.layers.{layer}."
        mixed = experts is not None and layer in experts.layers
        if spec.qk_norm:
            shapes |= {f"{prefix}self_attn.{name}.weight": (spec.head_dim,) for name in ("q_norm", "k_norm")}
        for norm in ("input_layernorm", "post_attention_layernorm"):
            shapes[f"{prefix}{norm}.weight"] = (spec.hidden,)
        for name, (rows, columns, bias) in linears.items():
            if mixed and name.startswith("mlp."):
                continue
            shapes[f"{prefix}{name}.weight"] = (rows, columns)
            if bias:
                shapes[f"{prefix}{name}.bias"] = (rows,)
        if experts is not None and mixed:
            shapes |= {prefix + name: shape for name, shape in _expert_shapes(spec, experts).items()}
    shapes["model.norm.weight"] = (spec.hidden,)
    if not spec.tied:
        shapes["lm_head.weight"] = (spec.vocab, spec.hidden)
    return shapes


@dataclass(frozen=True, slots=True)
class ExpertNames:
    """Where a layer keeps its experts: the router, the prefix of the experts, gate, up and down of each."""

    router: str = "mlp.gate"
    experts: str = "mlp.experts"
    linears: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj")


def expert_names(family: str) -> ExpertNames:
    """Return a family's names of experts."""
    if family == "mixtral":
        return ExpertNames("block_sparse_moe.gate", "block_sparse_moe.experts", ("w1", "w3", "w2"))
    return ExpertNames()


def _expert_shapes(spec: ModelSpec, experts: Experts) -> dict[str, tuple[int, ...]]:
    """Return the tensors of one layer's mixture of experts, without the layer's prefix."""
    names, hidden = expert_names(spec.family), spec.hidden
    shapes: dict[str, tuple[int, ...]] = {f"{names.router}.weight": (experts.count, hidden)}
    parts = [(f"{names.experts}.{number}", names.linears, experts.ffn) for number in range(experts.count)]
    if experts.shared_ffn:
        parts.append(("mlp.shared_expert", ExpertNames().linears, experts.shared_ffn))
        shapes["mlp.shared_expert_gate.weight"] = (1, hidden)
    for prefix, (gate, up, down), ffn in parts:
        shapes |= {f"{prefix}.{name}.weight": (ffn, hidden) for name in (gate, up)}
        shapes[f"{prefix}.{down}.weight"] = (hidden, ffn)
    return shapes


def whole(config: Config, key: str, default: int | None = None) -> int:
    """Return a positive whole number of a config; null counts as absent. Raises CheckpointError."""
    value = _present(config, key, default)
    largest = _LARGEST[key]
    if type(value) is not int or not 1 <= value <= largest:
        raise refuse(key, value, f"a whole number from 1 to {largest}")
    return value


def real(
    config: Config, key: str, default: float | None = None, *, above: float = -math.inf, most: float = math.inf
) -> float:
    """Return a finite number of a config, greater than `above`; null counts as absent. Raises CheckpointError."""
    value = _present(config, key, default)
    try:
        fits = not isinstance(value, bool) and isinstance(value, int | float) and math.isfinite(value)
    except OverflowError:
        fits = False
    if not fits or not above < float(value) <= most:  # type: ignore[arg-type]  # a number if it fits
        bounds = f" above {above:g}" if above > -math.inf else ""
        bounds += f" and at most {most:g}" if most < math.inf else ""
        raise refuse(key, value, f"a finite number{bounds}")
    return float(value)  # type: ignore[arg-type]  # checked above


def truth(config: Config, key: str, default: bool = False) -> bool:
    """Return true or false of a config; null counts as absent. Raises CheckpointError."""
    value = _present(config, key, default)
    if not isinstance(value, bool):
        raise refuse(key, value, "true or false")
    return value


def _present(config: Config, key: str, default: object) -> object:
    value = config.get(key)
    if value is not None:
        return value
    if default is None:
        raise CheckpointError(f"config: {key} is missing")
    return default


def refuse(key: str, value: object, allowed: str) -> CheckpointError:
    """Return the error of a config value that is not allowed."""
    shown = f"{len(value)} values" if isinstance(value, Sequence) and not isinstance(value, str) else repr(value)
    return CheckpointError(f"config: {key}={shown[:80]}: must be {allowed}")
