"""From a checkpoint to a bound decoder, layer by layer: the peak is the model plus one layer in 32 bit."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from omniserve.base.errors import CheckpointError
from omniserve.base.spec import Experts, ModelSpec
from omniserve.formats.artifact import read_linear, scheme_of
from omniserve.formats.checkpoint import Source
from omniserve.formats.table import weight_format
from omniserve.formats.w16a16 import DenseWeight
from omniserve.formats.weight import Head, HeadFormat, Weight, WeightFormat
from omniserve.layers.attention import Attention
from omniserve.layers.mlp import MLP
from omniserve.layers.moe import MoE
from omniserve.layers.norm import Norm
from omniserve.models.decoder import Block, Decoder
from omniserve.models.families import expert_names
from omniserve.ops.act import ActFormat
from omniserve.ops.rope import Rope
from omniserve.sparsity.policy import Policy

Progress = Callable[[int, int], None]
"""Called as progress(layers done, layers)."""


def load_decoder(
    source: Source,
    spec: ModelSpec,
    *,
    weights: WeightFormat,
    head: HeadFormat,
    dtype: torch.dtype,
    device: torch.device,
    policy: Policy,
    rope: Rope,
    progress: Progress | None = None,
) -> Decoder:
    """Return the decoder of a checkpoint: of a quantized one as stored, else its linears rounded to `weights`.

    head  the format of the projection to logits, which checkpoints keep in 16 bit
    Raises CheckpointError naming a tensor that holds NaN, infinity or values that its format does not allow.
    """
    reader = _Reader(source, weights, dtype, device)
    blocks = []
    for layer in range(spec.layers):
        blocks.append(_block(reader, spec, layer, policy, rope))
        if progress is not None:
            progress(layer + 1, spec.layers)
    embedding = reader.plain("model.embed_tokens.weight")
    projection = reader.head(head, embedding)
    norm = Norm(reader.plain("model.norm.weight"), spec.norm_eps)
    return Decoder(
        spec=spec,
        embedding=embedding,
        blocks=tuple(blocks),
        norm=norm,
        head=projection,
        weight_bytes=reader.total_bytes,
    )


def _block(reader: "_Reader", spec: ModelSpec, layer: int, policy: Policy, rope: Rope) -> Block:
    prefix = f"model.layers.{layer}."
    attention = prefix + "self_attn."
    return Block(
        norm1=Norm(reader.plain(prefix + "input_layernorm.weight"), spec.norm_eps),
        attention=Attention(
            layer=layer,
            qkv=_qkv(reader, spec, layer, attention, policy),
            out=reader.linear([attention + "o_proj"]),
            rope=_rope(reader, spec, attention, rope),
            policy=policy,
            heads=spec.heads,
            head_dim=spec.head_dim,
        ),
        norm2=Norm(reader.plain(prefix + "post_attention_layernorm.weight"), spec.norm_eps),
        mlp=_feed_forward(reader, spec, layer, prefix),
    )


def _qkv(reader: "_Reader", spec: ModelSpec, layer: int, attention: str, policy: Policy) -> Weight:
    """Return the fused q|k|v weight, its heads in the policy's order."""
    q, kv = spec.group * spec.head_dim, spec.head_dim
    rows = {
        name: None if policy.split is None else policy.split.rows(layer, size)
        for name, size in (("q_proj", q), ("k_proj", kv), ("v_proj", kv))
    }
    return reader.linear([attention + name for name in rows], list(rows.values()))


NAMES = ("gate_proj", "up_proj", "down_proj")
"""The three linears of a feed-forward part."""


def _feed_forward(reader: "_Reader", spec: ModelSpec, layer: int, prefix: str) -> MLP | MoE:
    if spec.experts is not None and layer in spec.experts.layers:
        return _moe(reader, spec, spec.experts, prefix)
    return _mlp(reader, prefix + "mlp.", NAMES)


def _mlp(reader: "_Reader", prefix: str, names: tuple[str, str, str]) -> MLP:
    gate, up, down = (prefix + name for name in names)
    return MLP(gate_up=reader.linear([gate, up]), down=reader.linear([down]))


def _moe(reader: "_Reader", spec: ModelSpec, experts: Experts, prefix: str) -> MoE:
    names = expert_names(spec.family)
    shared = prefix + "mlp.shared_expert"
    made = MoE(
        router=reader.dense(f"{prefix}{names.router}"),
        experts=tuple(_mlp(reader, f"{prefix}{names.experts}.{e}.", names.linears) for e in range(experts.count)),
        chosen=experts.chosen,
        normalize=experts.normalize,
        shared=_mlp(reader, shared + ".", NAMES) if experts.shared_ffn else None,
        shared_gate=reader.dense(shared + "_gate") if experts.shared_ffn else None,
    )
    wanted = [part.wants.value for part in (*made.experts, *([made.shared] if made.shared else []))]
    if len(set(wanted)) > 1:
        raise CheckpointError(
            f"the experts of {prefix}{names.experts} want their input as {' and as '.join(sorted(set(wanted)))}: gate "
            "and up of all experts of a layer must have formats with the same activations"
        )
    return made


def _rope(reader: "_Reader", spec: ModelSpec, attention: str, rope: Rope) -> Rope:
    """Return the rotation of one layer, with the gains of its q and k norms where the model has them."""
    if not spec.qk_norm:
        return rope
    q, k = (reader.plain(f"{attention}{name}.weight") for name in ("q_norm", "k_norm"))
    return Rope(rope.table, q, k, spec.norm_eps)


class _Reader:
    """Reads tensors of one source into one precision and counts their bytes."""

    def __init__(self, source: Source, weights: WeightFormat, dtype: torch.dtype, device: torch.device) -> None:
        self._source = source
        self._scheme = scheme_of(source)
        self._weights = weights
        self._dtype = dtype
        self._device = device
        self.total_bytes = 0

    def plain(self, name: str) -> Tensor:
        """Return a tensor in the model's dtype."""
        tensor = self._finite(name).to(self._device, self._dtype).contiguous()
        self.total_bytes += tensor.nbytes
        return tensor

    def head(self, form: HeadFormat, embedding: Tensor) -> Head:
        """Return the projection to logits: its own tensor if there is one, whatever the config says, else a tied one.

        A tied one is held twice where it is packed or rounded, once for the look-up of tokens.
        """
        own = "lm_head.weight" in self._source.names()
        if own or form.wants is not ActFormat.PLAIN:
            dense = self._finite("lm_head.weight" if own else "model.embed_tokens.weight").to(self._device)
        else:
            dense = embedding
        head = form.bind(form.from_dense(dense), bias=None, dtype=self._dtype)
        if not (isinstance(head, DenseWeight) and head.weight is embedding):
            self.total_bytes += head.nbytes
        return head

    def dense(self, module: str) -> Weight:
        """Return a linear without bias that stays in the model's dtype, whatever the precision."""
        form = weight_format("w16a16")
        stored = form.from_dense(self._finite(f"{module}.weight").to(self._device))
        weight = form.bind(stored, bias=None, dtype=self._dtype)
        self.total_bytes += weight.nbytes
        return weight

    def linear(self, modules: Sequence[str], rows: Sequence[list[int] | None] | None = None) -> Weight:
        """Return the fused weight of linears that read the same input, rows one after the other.

        rows  of each linear, the old place of every row; None: as stored. All parameters of a row move along.
        """
        form = self._format(modules)
        places = [None if r is None else torch.tensor(r, device=self._device) for r in rows or [None] * len(modules)]
        stored = [
            {name: _moved(tensor, place) for name, tensor in self._stored(form, module).items()}
            for module, place in zip(modules, places, strict=True)
        ]
        bias = None
        if f"{modules[0]}.bias" in self._source.names():
            each = (self._finite(f"{module}.bias").to(self._device, self._dtype) for module in modules)
            bias = torch.cat([_moved(one, place) for one, place in zip(each, places, strict=True)])
        weight = form.bind(form.concat(stored), bias=bias, dtype=self._dtype)
        self.total_bytes += weight.nbytes
        return weight

    def _format(self, modules: Sequence[str]) -> WeightFormat:
        """Return the one format of linears that become one weight."""
        if self._scheme is None:
            return self._weights
        forms = [self._scheme.form(module) for module in modules]
        for module, form in zip(modules, forms, strict=True):
            if form.name != forms[0].name:
                raise CheckpointError(
                    f"{self._source.path}: {modules[0]!r} is {forms[0].name} and {module!r} is {form.name}: linears "
                    "that read the same input are one weight here and must share a format"
                )
        return forms[0]

    def _stored(self, form: WeightFormat, module: str) -> dict[str, Tensor]:
        """Return the stored tensors of one linear: as they are, or rounded from 16 bit."""
        if self._scheme is None:
            return form.from_dense(self._finite(f"{module}.weight").to(self._device))
        tensors = read_linear(self._source, self._scheme, module)
        return {name: tensor.to(self._device) for name, tensor in tensors.items()}

    def _finite(self, name: str) -> Tensor:
        tensor = self._source.tensor(name)
        if not bool(torch.isfinite(tensor).all()):
            raise CheckpointError(f"{self._source.path}: tensor {name} holds NaN or infinity")
        return tensor


def _moved(tensor: Tensor, rows: Tensor | None) -> Tensor:
    return tensor if rows is None else tensor[rows]
