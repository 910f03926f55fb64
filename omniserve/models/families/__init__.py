"""The families: one file each, one line each in `FAMILIES`."""

from collections.abc import Callable, Container, Mapping
from dataclasses import dataclass

import torch

from omniserve.base.config import nearest
from omniserve.base.errors import CheckpointError
from omniserve.base.spec import ModelSpec
from omniserve.formats.artifact import Scheme, scheme_of
from omniserve.formats.checkpoint import Source, listed
from omniserve.formats.weight import Field
from omniserve.models.families import llama, mistral, qwen
from omniserve.models.families.llama import expert_names

__all__ = ["FAMILIES", "Family", "check_tensors", "expected", "expert_names", "family", "linears"]


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


def linears(spec: ModelSpec) -> dict[str, tuple[int, int]]:
    """Return [N, K] of every module that a precision applies to: the linears of the layers, but no router or gate."""
    dense = (expert_names(spec.family).router, "mlp.shared_expert_gate")
    return {
        module: (shape[0], shape[1])
        for name, shape in expected(spec).items()
        if name.startswith("model.layers.") and len(shape) == 2
        if not (module := name.removesuffix(".weight")).endswith(dense)
    }


def check_tensors(source: Source, spec: ModelSpec) -> None:
    """Raise CheckpointError unless the checkpoint holds exactly the decoder's tensors, in the types they must have.

    Those of a quantized checkpoint in our layout are what its description calls for; a foreign layout is translated
    first. A head of its own is allowed, and used, whatever `tie_word_embeddings` says (formats.md section 2).
    """
    scheme = scheme_of(source)
    wanted: dict[str, Field | tuple[int, ...]] = dict(expected(spec))
    if scheme is not None:
        wanted = _stored(source, spec, scheme)
    held = source.names()
    if "lm_head.weight" in held:
        wanted["lm_head.weight"] = (spec.vocab, spec.hidden)
    if missing := [name for name in wanted if name not in held]:
        raise CheckpointError(f"{source.path}: {listed(missing)} missing")
    harmless = _HARMLESS if scheme is None else _HARMLESS[:1]
    if surplus := sorted(name for name in held if name not in wanted and not name.endswith(harmless)):
        raise CheckpointError(f"{source.path}: {listed(surplus)} no part of a {spec.family} model")
    for name, field in wanted.items():
        shape = field.shape if isinstance(field, Field) else field
        if source.shape(name) != shape:
            given = list(source.shape(name))
            raise CheckpointError(
                f"{source.path}: tensor {name!r} has shape {given}, the config calls for {list(shape)}"
            )
        dtype = source.dtype(name)
        if isinstance(field, Field):
            if dtype not in (field.dtype, *field.also):
                raise CheckpointError(f"{source.path}: tensor {name!r} is {dtype}, it must be {field.dtype}")
        elif not dtype.is_floating_point:
            raise CheckpointError(f"{source.path}: tensor {name!r} is {dtype}, a dense weight must be F32, F16 or BF16")


def _stored(source: Source, spec: ModelSpec, scheme: Scheme) -> dict[str, Field | tuple[int, ...]]:
    """Return the tensors of a quantized checkpoint: of a linear those of its format, of a layer those of its KV."""
    wanted: dict[str, Field | tuple[int, ...]] = dict(expected(spec))
    modules = linears(spec)
    _check_modules(source, scheme, wanted, modules)
    for module, (n, k) in modules.items():
        form = scheme.form(module)
        if form.name != "w16a16":
            del wanted[f"{module}.weight"]
            try:
                wanted |= {f"{module}.{name}": field for name, field in form.fields(n, k).items()}
            except CheckpointError as error:
                raise CheckpointError(f"{source.path}: {module!r}: {error}") from None
    for layer in range(spec.layers):
        attention = f"model.layers.{layer}.self_attn"
        if scheme.kv.key_mean:
            shape = (spec.kv_heads, spec.head_dim)
            wanted[f"{attention}.key_mean"] = Field(shape, torch.float16, (torch.float32,))
        if scheme.kv.static:
            wanted[f"{attention}.kv_scale"] = Field((2, spec.kv_heads), torch.float32, (torch.float16,))
    return wanted


def _check_modules(source: Source, scheme: Scheme, tensors: Container[str], modules: Container[str]) -> None:
    """Raise CheckpointError if the description names a module that is not there."""
    for key, named, known in (
        ("overrides", scheme.overrides, lambda module: module in modules),
        ("keep", scheme.keep, lambda module: f"{module}.weight" in tensors or module == "lm_head"),
    ):
        for module in named:
            if not known(module):
                raise CheckpointError(
                    f"{source.path}: quantization_config.weights: {key} names {module!r}, which is no "
                    f"{'linear' if key == 'overrides' else 'module'} of this model"
                )
