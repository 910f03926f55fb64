"""From logits to token ids, on the device, each row by its own request's parameters.

Randomness is counter-based: a draw depends on (seed, position) alone, so a request draws the same tokens alone, in any
batch, and again after a preemption.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from omniserve.base.types import SamplingParams
from omniserve.ops.dispatch import operation


@dataclass(frozen=True, slots=True)
class SampleRows:
    """Parameters of S rows: temperature, top_p, min_p fp32 [S]; top_k, seed, position int64 [S].

    position  index of the token that is drawn, in its sequence
    greedy    no row has a temperature above 0 (known to the host: nothing else is computed)
    """

    temperature: Tensor
    top_p: Tensor
    min_p: Tensor
    top_k: Tensor
    seed: Tensor
    position: Tensor
    greedy: bool


class SampleState:
    """Sampling parameters of every request slot. Mutable: a slot is set when a request takes it."""

    def __init__(self, slots: int, device: torch.device) -> None:
        self._floats = torch.zeros(slots, 3, device=device)
        self._wholes = torch.zeros(slots, 2, dtype=torch.int64, device=device)
        self._random = [False] * slots

    def set(self, slot: int, sampling: SamplingParams, seed: int) -> None:
        """Give a slot its request's parameters."""
        self._random[slot] = sampling.temperature > 0
        self._floats[slot] = torch.tensor([sampling.temperature, sampling.top_p, sampling.min_p])
        self._wholes[slot] = torch.tensor([max(sampling.top_k, 0), seed])

    def rows(self, slots: list[int], positions: Tensor) -> SampleRows:
        """Return the parameters of the rows that draw; positions int64 [S]."""
        index = torch.tensor(slots, dtype=torch.int64, device=positions.device)
        floats, wholes = self._floats[index], self._wholes[index]
        greedy = not any(self._random[slot] for slot in slots)
        return SampleRows(floats[:, 0], floats[:, 1], floats[:, 2], wholes[:, 0], wholes[:, 1], positions, greedy)


@operation
def sample(logits: Tensor, rows: SampleRows) -> Tensor:
    """Return one token id per row, int64 [S]; logits [S, V].

    Greedy rows (temperature 0) take the largest logit, the smallest id among equals. The others: softmax at the
    temperature; tokens below min_p times the largest probability go; then all but the top_k; then the tail beyond
    top_p of what is left (the first token that crosses it stays); then the inverse of the cumulative distribution at
    u(seed, position). Ties are ordered by token id.
    """
    greedy = logits.argmax(-1)  # the first among equals
    if rows.greedy:
        return greedy
    exact = logits if logits.dtype == torch.float64 else logits.float()
    hot = rows.temperature > 0
    scaled = exact / torch.where(hot, rows.temperature, 1.0)[:, None].to(exact.dtype)
    ordered, tokens = torch.sort(scaled, dim=-1, descending=True, stable=True)
    probability = torch.softmax(ordered, -1)
    kept = probability >= rows.min_p[:, None] * probability[:, :1]
    rank = torch.arange(logits.shape[1], device=logits.device)
    kept &= (rank < rows.top_k[:, None]) | (rows.top_k[:, None] == 0)
    probability = probability * kept
    probability = probability / probability.sum(-1, keepdim=True)
    before = probability.cumsum(-1) - probability
    probability = probability * (before < rows.top_p[:, None])
    cumulative = probability.cumsum(-1)
    target = uniform(rows.seed, rows.position).to(exact.dtype)[:, None] * cumulative[:, -1:]
    choice = torch.searchsorted(cumulative, target, right=True).clamp_(max=logits.shape[1] - 1)
    choice = torch.minimum(choice, (probability > 0).sum(-1, keepdim=True) - 1)
    drawn = tokens.gather(1, choice)[:, 0]
    return torch.where(hot, drawn, greedy)


def uniform(seed: Tensor, position: Tensor) -> Tensor:
    """Return u in [0, 1) fp64 from seed and position int64 [S]: splitmix64 of their combination, 53 bits of it.

    Source: Steele, Lea, Flood, "Fast splittable pseudorandom number generators" (OOPSLA 2014), the mix function.
    """
    z = seed + (position + 1) * -7046029254386353131  # 0x9E3779B97F4A7C15; int64 wraps
    z = (z ^ _shift(z, 30)) * -4658895280553007687  # 0xBF58476D1CE4E5B9
    z = (z ^ _shift(z, 27)) * -7723592293110705685  # 0x94D049BB133111EB
    z = z ^ _shift(z, 31)
    return _shift(z, 11).double() * 2.0**-53


def _shift(z: Tensor, by: int) -> Tensor:
    """Logical right shift of int64."""
    return (z >> by) & ((1 << (64 - by)) - 1)
