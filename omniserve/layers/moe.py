"""A mixture of experts in place of one feed-forward part."""

from dataclasses import dataclass

import torch
from torch import Tensor

from omniserve.formats.weight import Weight
from omniserve.layers.mlp import MLP
from omniserve.ops.act import Act, ActFormat, Both, Int8, Plain


@dataclass(frozen=True, slots=True, kw_only=True)
class MoE:
    """Each token goes through its `chosen` likeliest experts, weighted by the router's softmax.

    router       [E, C] in 16 bit; experts: E feed-forward parts, all of one precision
    normalize    the weights of the chosen experts are scaled to sum 1
    shared       the part that every token goes through, times sigmoid(shared_gate), [1, C] in 16 bit; or None
    Source: Mixtral (arXiv 2401.04088) section 2.1; shared expert: Qwen1.5-MoE as transformers computes it.
    """

    router: Weight
    experts: tuple[MLP, ...]
    chosen: int
    normalize: bool
    shared: MLP | None = None
    shared_gate: Weight | None = None

    @property
    def wants(self) -> ActFormat:
        """What the experts want, and the plain activations for the router."""
        return self.experts[0].wants.with_plain

    def __call__(self, a: Act) -> Tensor:
        """a [T, C] in self.wants. Returns [T, C]; experts are added up in their order, whoever else is in the batch."""
        plain: Act = a.plain if isinstance(a, Both) else a
        inner: Act = a.int8 if isinstance(a, Both) else a
        weights, experts = self._route(plain)
        out = torch.zeros(weights.shape[0], self.router.shape[1], dtype=a.dtype, device=weights.device)
        for number in torch.bincount(experts.flatten()).nonzero().flatten().tolist():
            token, place = torch.where(experts == number)
            part = self.experts[number](_rows(inner, token))
            out.index_add_(0, token, part * weights[token, place, None].to(part.dtype))
        if self.shared is not None and self.shared_gate is not None:
            out += torch.sigmoid(self.shared_gate.gemm(plain)) * self.shared(inner)
        return out

    def _route(self, a: Act) -> tuple[Tensor, Tensor]:
        """Return (weights fp32 or fp64 [T, chosen], experts int64 [T, chosen])."""
        logits = self.router.gemm(a)
        share = torch.softmax(logits if logits.dtype == torch.float64 else logits.float(), -1)
        weights, experts = torch.topk(share, self.chosen, dim=-1)
        return weights / weights.sum(-1, keepdim=True) if self.normalize else weights, experts


def _rows(a: Act, rows: Tensor) -> Act:
    """Return some tokens of the activations."""
    if isinstance(a, Plain):
        return Plain(a.x[rows])
    assert isinstance(a, Int8)
    return Int8(a.codes[rows], a.scale[rows], None if a.sum is None else a.sum[rows], a.dtype)
