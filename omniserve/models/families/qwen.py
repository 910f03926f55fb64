"""Qwen: Llama with biases on q, k and v (1.5, 2, 2.5) or norms on q and k (3), dense or with experts."""

from collections.abc import Sequence
from dataclasses import replace

from omniserve.base.spec import Experts, ModelSpec
from omniserve.models.families.llama import Config, decoder_spec, refuse, truth, whole


def qwen2(config: Config) -> ModelSpec:
    """Return the numbers of a config of model type qwen2 (Qwen 1.5, 2 and 2.5). Raises CheckpointError."""
    return _biased(config, "qwen2")


def qwen2_moe(config: Config) -> ModelSpec:
    """Return the numbers of a config of model type qwen2_moe. Raises CheckpointError."""
    made = _biased(config, "qwen2_moe")
    shared = whole(config, "shared_expert_intermediate_size", 5632)
    return replace(made, experts=_experts(config, made, shared))


def qwen3(config: Config) -> ModelSpec:
    """Return the numbers of a config of model type qwen3. Raises CheckpointError."""
    return _normed(config, "qwen3")


def qwen3_moe(config: Config) -> ModelSpec:
    """Return the numbers of a config of model type qwen3_moe. Raises CheckpointError."""
    made = _normed(config, "qwen3_moe")
    return replace(made, experts=_experts(config, made, 0))


def _biased(config: Config, family: str) -> ModelSpec:
    bias = truth(config, "qkv_bias", True)
    made = decoder_spec({**config, "attention_bias": bias, "mlp_bias": False}, family)
    return replace(made, out_bias=False, windows=_windows(config, made.layers))


def _normed(config: Config, family: str) -> ModelSpec:
    made = decoder_spec({"head_dim": 128, **config, "mlp_bias": False}, family)
    return replace(made, qk_norm=True, windows=_windows(config, made.layers))


def _windows(config: Config, layers: int) -> tuple[int | None, ...]:
    """Return each layer's sliding window: of the layers that `layer_types` or `max_window_layers` name."""
    if not truth(config, "use_sliding_window"):
        return ()
    window = whole(config, "sliding_window", 4096)
    kinds = config.get("layer_types")
    if kinds is None:
        first = config.get("max_window_layers", 28)
        if type(first) is not int or first < 0:
            raise refuse("max_window_layers", first, "a whole number, 0 or more")
        return tuple(window if layer >= first else None for layer in range(layers))
    known = {"sliding_attention": window, "full_attention": None}
    if not isinstance(kinds, Sequence) or len(kinds) != layers or not set(kinds) <= known.keys():
        raise refuse("layer_types", kinds, f"{layers} times {' or '.join(known)}")
    return tuple(known[kind] for kind in kinds)


def _experts(config: Config, made: ModelSpec, shared: int) -> Experts:
    count, chosen = whole(config, "num_experts"), whole(config, "num_experts_per_tok")
    if chosen > count:
        raise refuse("num_experts_per_tok", chosen, f"at most num_experts={count}")
    step, dense = whole(config, "decoder_sparse_step", 1), config.get("mlp_only_layers") or ()
    if not isinstance(dense, Sequence) or not all(type(layer) is int for layer in dense):
        raise refuse("mlp_only_layers", dense, "a list of layer numbers")
    mixed = (layer for layer in range(made.layers) if (layer + 1) % step == 0 and layer not in dense)
    return Experts(
        count=count,
        chosen=chosen,
        ffn=whole(config, "moe_intermediate_size"),
        shared_ffn=shared,
        normalize=truth(config, "norm_topk_prob"),
        layers=frozenset(mixed),
    )
