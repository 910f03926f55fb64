"""The families: one file each, one line each in `FAMILIES`."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from omniserve.base.config import nearest
from omniserve.base.errors import CheckpointError
from omniserve.base.spec import ModelSpec
from omniserve.formats.checkpoint import Source, listed
from omniserve.models.families import llama, mistral, qwen
from omniserve.models.families.llama import expert_names

__all__ = ["FAMILIES", "Family", "check_tensors", "expected", "expert_names", "family"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """How models of one type describe themselves.

    spec      config -> numbers; raises CheckpointError naming the key that is wrong
    expected  numbers -> names and shapes of all tensors
    """

    spec: Callable[[Mapping[str, object]], ModelSpec]
    expected: Callable[[ModelSpec], dict[str, tuple[int, ...]]] = llama.expected


FAMILIES: dict[str, Family] = {
    "llama": Family(spec=llama.spec),
    "mistral": Family(spec=mistral.spec),
    "mixtral": Family(spec=mistral.mixtral),
    "qwen2": Family(spec=qwen.qwen2),
    "qwen2_moe": Family(spec=qwen.qwen2_moe),
    "qwen3": Family(spec=qwen.qwen3),
    "qwen3_moe": Family(spec=qwen.qwen3_moe),
}
"""By `model_type` of config.json."""

_HARMLESS = ("rotary_emb.inv_freq", "self_attn.kv_scale", "self_attn.kv_scale_quant_orig")
"""Tensors that a checkpoint may hold beyond the decoder's: computed here anyway, or read by `kv_scales`."""


def family(config: Mapping[str, object]) -> Family:
    """Return the family that `config` names. Raises CheckpointError listing the families there are."""
    name = config.get("model_type")
    if not isinstance(name, str) or name not in FAMILIES:
        hint = nearest(name, FAMILIES) if isinstance(name, str) else ""
        raise CheckpointError(f"config: model_type={name!r}: must be one of {', '.join(sorted(FAMILIES))}{hint}")
    return FAMILIES[name]


def expected(spec: ModelSpec) -> dict[str, tuple[int, ...]]:
    """Return the names and shapes of the tensors that the decoder of `spec` reads."""
    return FAMILIES[spec.family].expected(spec)


def check_tensors(source: Source, spec: ModelSpec) -> None:
    """Raise CheckpointError unless the checkpoint holds exactly the decoder's tensors, in floating types.

    A head of its own is allowed, and used, whatever `tie_word_embeddings` says (formats.md section 2).
    """
    if (block := source.config.get("quantization_config")) is not None:
        method = block.get("quant_method") if isinstance(block, Mapping) else block
        raise CheckpointError(
            f"{source.path}: quantized by {method!r}, this version reads 16-bit and 32-bit checkpoints"
        )
    wanted = expected(spec)
    held = source.names()
    if "lm_head.weight" in held:
        wanted["lm_head.weight"] = (spec.vocab, spec.hidden)
    if missing := [name for name in wanted if name not in held]:
        raise CheckpointError(f"{source.path}: {listed(missing)} missing")
    if surplus := sorted(name for name in held if name not in wanted and not name.endswith(_HARMLESS)):
        raise CheckpointError(f"{source.path}: {listed(surplus)} no part of a {spec.family} model")
    for name, shape in wanted.items():
        if source.shape(name) != shape:
            given = list(source.shape(name))
            raise CheckpointError(
                f"{source.path}: tensor {name!r} has shape {given}, the config calls for {list(shape)}"
            )
        if not source.dtype(name).is_floating_point:
            raise CheckpointError(
                f"{source.path}: tensor {name!r} is {source.dtype(name)}, a dense weight must be F32, F16 or BF16"
            )
