"""What requests change about their logits before a token is drawn: biases, bans, what a grammar forbids, penalties."""

from dataclasses import dataclass

import torch
from torch import Tensor

from omniserve.ops.dispatch import operation

PROMPT = 1 << 30
"""Bit of a token's count that says: it occurs in the prompt. The bits below count how often it was produced."""
LEAST_PENALTY = 1e-30
"""A logit divided by a smaller number could be infinite in 32 bits."""
NONE = -1
"""Fills tables beyond a row's own entries; no token has this id."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Bias:
    """Rows whose logits are shifted. rows, slots int64 [s]; table fp32 [slots, V], added; -inf forbids."""

    rows: Tensor
    slots: Tensor
    table: Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Muted:
    """Rows that must not end yet. rows int64 [s]; ids int64 [s, E]: forbidden; an id may come twice."""

    rows: Tensor
    ids: Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class BadWords:
    """Rows with sequences that are not produced, each `beginning, last token`, flush right.

    rows, slots int64 [s]; words int64 [s, B, W + 1], -1 before a sequence; recent int64 [s, W]: produced last, -1
    before the first
    """

    rows: Tensor
    slots: Tensor
    words: Tensor
    recent: Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Masked:
    """Rows with a grammar. rows int64 [s]; bits int32 [s, ceil(V / 32)]: tokens that may be drawn, lowest bit first."""

    rows: Tensor
    bits: Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Penalties:
    """Rows whose tokens are counted. rows, slots int64 [s]; counts int32 [slots, V]; the penalties fp64 [s].

    counts  how often a token was produced, plus `PROMPT` if it occurs in the prompt
    """

    rows: Tensor
    slots: Tensor
    counts: Tensor
    repetition: Tensor
    presence: Tensor
    frequency: Tensor


@operation
def changed(logits: Tensor, bias: Bias | None, masked: Masked | None, penalties: Penalties | None) -> Tensor:
    """Return the logits [S, V] after biases, -inf where a mask forbids, and penalties: a copy, fp32 (fp64 of fp64).

    Source of the penalties: CTRL (arXiv 1909.05858) section 4.1 with the sign of transformers' and vLLM's
    implementations for repetition; the API reference of OpenAI for presence and frequency.
    """
    x = logits.to(exact(logits), copy=True)
    if bias is not None:
        x[bias.rows] += bias.table[bias.slots].to(x.dtype)
    if masked is not None:
        x[masked.rows] = x[masked.rows].where(_allowed(masked.bits, x.shape[1]), -torch.inf)
    if penalties is not None:
        x[penalties.rows] = _penalized(x[penalties.rows], penalties)
    return x


def _allowed(bits: Tensor, vocab: int) -> Tensor:
    """Unpack bits int32 [s, W] to bool [s, vocab]."""
    places = torch.arange(32, dtype=torch.int32, device=bits.device)
    return (bits[:, :, None] >> places & 1).bool().flatten(1)[:, :vocab]


def without(x: Tensor, bad: BadWords) -> Tensor:
    """Return the rows of logits [s, V] with -inf for tokens that would end a bad word, unless that leaves none."""
    begin, last = bad.words[:, :, :-1], bad.words[:, :, -1]
    met = ((begin == bad.recent[:, None]) | (begin == NONE)).all(-1) & (last != NONE)
    forbidden = torch.where(met, -torch.inf, 0.0).to(x.dtype)
    without = x.scatter_add(1, last.clamp(min=0), forbidden)  # a scatter of sums: words may share their last token
    return torch.where((without == -torch.inf).all(1, keepdim=True), x, without)


def _penalized(x: Tensor, penalties: Penalties) -> Tensor:
    counts = penalties.counts[penalties.slots]
    seen = (counts > 0).to(x.dtype)
    penalty = penalties.repetition[:, None].to(x.dtype).clamp(min=LEAST_PENALTY)
    repetition = seen * penalty + (1 - seen)
    # Of the two summands one is 0; torch.where is slower on a CPU.
    x = x.clamp(min=0) / repetition + x.clamp(max=0) * repetition
    times = counts & (PROMPT - 1)
    x -= penalties.frequency[:, None].to(x.dtype) * times
    x -= penalties.presence[:, None].to(x.dtype) * (times > 0)
    return x


def exact(logits: Tensor) -> torch.dtype:
    """Return the dtype in which logits are changed and weighed."""
    return torch.float64 if logits.dtype == torch.float64 else torch.float32
