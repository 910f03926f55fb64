"""The artefact as it lies on the disk: shards, index, config.json, report. Layout: qoq.md section 4."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal, cast

import torch
from safetensors.torch import save
from torch import Tensor

from omniserve.base.spec import ModelSpec
from omniserve.formats.artifact import KVScheme, Scheme
from omniserve.formats.checkpoint import INDEX
from omniserve.models.families import expert_names
from omniserve.quantize.calibration import Calibration
from omniserve.quantize.recipe import Recipe
from omniserve.quantize.spill import write_atomically

REPORT = "quantize-report.json"
"""What each step did to each layer; for people and plots, not for loading."""


def shard_name(number: int, count: int) -> str:
    """Return the file name of shard 0..count - 1."""
    return f"model-{number + 1:05d}-of-{count:05d}.safetensors"


def write_shard(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write tensors to a safetensors file, whole or not at all. Equal tensors make equal bytes."""
    held = {name: tensors[name].detach().to("cpu").contiguous() for name in sorted(tensors)}
    write_atomically(path, save(held, metadata={"format": "pt"}))


def write_json(path: Path, value: object) -> None:
    """Write a value as JSON, whole or not at all."""
    write_atomically(path, (json.dumps(value, indent=1, ensure_ascii=False) + "\n").encode())


def write_index(folder: Path, shards: Mapping[str, Sequence[str]], total_bytes: int) -> None:
    """Write which tensor lies in which shard."""
    places = {tensor: shard for shard, tensors in shards.items() for tensor in tensors}
    index = {"metadata": {"total_size": total_bytes}, "weight_map": dict(sorted(places.items()))}
    write_json(folder / INDEX, index)


def scheme(
    recipe: Recipe,
    spec: ModelSpec,
    *,
    calibration: Calibration | None,
    source_sha256: Mapping[str, str],
    version: str,
) -> Scheme:
    """Return what the artefact says about itself."""
    kv = recipe.kv
    overrides = {name: form for name, form in recipe.weights.overrides.items() if form != recipe.weights.format}
    return Scheme(
        weights=recipe.weights.format,
        overrides=overrides,
        keep=tuple(kept(spec)),
        kv=KVScheme(bits=cast(Literal[4, 8, 16], kv.keys), static=kv.static, key_mean=recipe.centred),
        made_by={
            "recipe": {"sha256": recipe.sha256, **recipe.as_dict()},
            "transforms": recipe.transforms,
            "calibration": {} if calibration is None else calibration.describe(),
            "source_sha256": dict(source_sha256),
            "omniserve": version,
        },
    )


def kept(spec: ModelSpec) -> list[str]:
    """Return the modules that stay in 16 bit: head, embedding, routers."""
    routers = []
    if spec.experts is not None:
        names = expert_names(spec.family)
        for layer in sorted(spec.experts.layers):
            routers.append(f"model.layers.{layer}.{names.router}")
            if spec.experts.shared_ffn:
                routers.append(f"model.layers.{layer}.mlp.shared_expert_gate")
    return ["lm_head", "model.embed_tokens", *routers]


def config(source: Mapping[str, object], scheme: Scheme, *, tied: bool) -> dict[str, object]:
    """Return the artefact's config.json: the model's own, in fp16, with the description of what was quantized."""
    made = {name: value for name, value in source.items() if name not in ("quantization_config", "dtype")}
    return made | {"torch_dtype": "float16", "tie_word_embeddings": tied, "quantization_config": scheme.block()}


def dtype_of(x: Tensor) -> Tensor:
    """Return a 16-bit tensor of embedding or head: fp16, or bf16 where fp16 would overflow."""
    made = x.half()
    return made if bool(torch.isfinite(made).all()) else x.bfloat16()
